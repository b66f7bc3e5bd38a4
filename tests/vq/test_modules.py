"""mk.nn's quantizers: what they return, how their codebooks move, what they count, one process against two."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import mmgen_kernels as mk
from mmgen_kernels import nn

KINDS = (nn.VectorQuantizer, nn.EMAVectorQuantizer)
KEY = torch.tensor([1, 2])


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", (False, True))
def test_images_and_heads_are_only_layouts(kind, normalize):
    """Channels in front and one codebook per head: the same as `vector_quantize` on rows."""
    torch.manual_seed(0)
    quantizer = kind(7, 6, heads=2, channel_dim=1, normalize=normalize).eval()
    x = latents(3, 6, 4, 5)  # (B, D, H, W)
    out = quantizer(x)
    rows = x.permute(0, 2, 3, 1).reshape(3, 4, 5, 2, 3).permute(3, 0, 1, 2, 4)  # (heads, B, H, W, D / heads)
    expected = mk.vector_quantize(F.normalize(rows, dim=-1) if normalize else rows, quantizer.codes())
    assert out.quantized.shape == x.shape and out.indices.shape == (3, 4, 5, 2)
    assert torch.equal(out.indices, expected.indices.movedim(0, -1))
    assert torch.equal(out.quantized, expected.quantized.permute(1, 2, 3, 0, 4).flatten(-2).permute(0, 3, 1, 2))
    torch.testing.assert_close(quantizer.codes_to_embedding(out.indices), out.quantized)


def test_the_learned_codebook_has_the_gradient_of_its_loss():
    quantizer, x = nn.VectorQuantizer(5, 3, beta=0.5), latents(40, 3)
    out = quantizer(x)
    out.loss.backward()
    expected = mk.vector_quantize(x, quantizer.codebook.detach().requires_grad_(), beta=0.5)
    assert torch.equal(out.loss, expected.loss) and quantizer.codebook.grad.abs().sum() > 0


def test_the_ema_codebook_moves_as_the_formula_says():
    quantizer = nn.EMAVectorQuantizer(5, 3, decay=0.8, eps=1e-5)
    x = latents(64, 3)
    codebook, size, total = quantizer.codebook.double(), torch.ones(5).double(), quantizer.codebook.double()
    for _ in range(4):
        out = quantizer(x)
        one_hot = F.one_hot((x.double()[:, None] - codebook[None]).square().sum(-1).argmin(1), 5).double()
        torch.testing.assert_close(out.quantized.double(), one_hot @ codebook, rtol=1e-5, atol=1e-6)
        size = 0.8 * size + 0.2 * one_hot.sum(0)
        total = 0.8 * total + 0.2 * one_hot.T @ x.double()
        codebook = total / ((size + 1e-5) / (size.sum() + 5e-5) * size.sum())[:, None]
        torch.testing.assert_close(quantizer.codebook.double(), codebook, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.loss, 0.25 * out.commitment_loss) and quantizer.step == 4
    assert [name for name, _ in quantizer.named_parameters()] == []


def test_the_gradient_is_that_of_the_codebook_before_its_update():
    quantizer, x = nn.EMAVectorQuantizer(5, 3), latents(20, 3).requires_grad_()
    before = quantizer.codebook.clone()
    out = quantizer(x)
    assert not torch.equal(quantizer.codebook, before)
    (out.quantized.sum() + out.loss).backward()
    y = x.detach().requires_grad_()
    again = mk.vector_quantize(y, before)
    (again.quantized.sum() + 0.25 * again.commitment_loss).backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing(kind):
    quantizer = kind(5, 3).eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(latents(20, 3))
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())
    assert quantizer.epoch_counts.sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_usage_and_perplexity(kind):
    quantizer = kind(4, 1)
    quantizer.codebook.data.copy_(torch.tensor([[0.0], [10], [20], [30]]))
    quantizer(torch.tensor([[1.0], [9], [11], [1], [500]]), mask=torch.tensor([True, True, True, True, False]))
    usage, perplexity = quantizer.batch_usage()
    assert usage == 0.5 and torch.isclose(perplexity, torch.tensor(2.0))
    quantizer.codebook.data.copy_(torch.tensor([[0.0], [10], [20], [30]]))
    quantizer(torch.tensor([[21.0], [29]] * 2))
    assert quantizer.batch_usage().usage == 0.5 and quantizer.epoch_usage().usage == 1
    assert torch.isclose(quantizer.epoch_usage().perplexity, torch.tensor(4.0))
    quantizer.reset_usage()
    assert quantizer.epoch_usage() == (0, 1)


def test_dead_codes_start_again_from_rows():
    quantizer = nn.EMAVectorQuantizer(64, 2, decay=0.5, dead_code_threshold=0.6)
    quantizer.codebook.add_(100)
    x = latents(256, 2)
    for _ in range(3):
        quantizer(x)
    assert (quantizer.codebook.norm(dim=-1) < 20).all() and quantizer.batch_usage().usage > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_kmeans_start(kind):
    x = latents(200, 4) + 20 * latents(8, 4, seed=1).repeat(25, 1)
    quantizer = kind(8, 4)
    far = quantizer.eval()(x).commitment_loss
    quantizer.initialize(x, KEY, iterations=20)
    assert quantizer(x).commitment_loss < far / 4


def test_a_checkpoint_goes_on_to_the_bit():
    def run(quantizer, steps):
        for step in steps:
            quantizer(latents(50, 3, seed=step))
        return quantizer

    torch.manual_seed(0)
    whole = nn.EMAVectorQuantizer(16, 3, dead_code_threshold=1.0, seed=5)
    half = run(copy.deepcopy(whole), range(5))
    run(whole, range(10))
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = nn.EMAVectorQuantizer(16, 3, dead_code_threshold=1.0, seed=99)
    resumed.load_state_dict(torch.load(file))
    run(resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_averages_stay_in_fp32_when_the_model_goes_to_half():
    quantizer = torch.nn.Sequential(nn.EMAVectorQuantizer(16, 3)).to(torch.bfloat16)
    before = quantizer[0].codebook.clone()
    out = quantizer(latents(50, 3).bfloat16())
    assert all(quantizer[0].get_buffer(n).dtype == torch.float32 for n in ("codebook", "cluster_size", "code_sum"))
    assert out.quantized.dtype == torch.float32 and not torch.equal(before, quantizer[0].codebook)
    assert quantizer.double()[0].codebook.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind):
    torch.manual_seed(0)
    quantizer = kind(16, 6, heads=2, normalize=True)
    twin = copy.deepcopy(quantizer)
    if kind is nn.EMAVectorQuantizer:
        quantizer.dead_code_threshold = twin.dead_code_threshold = 1.0
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = latents(30, 6, seed=step)
        for a, b in zip(compiled(x), twin(x), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.state_dict().values(), twin.state_dict().values(), strict=True))


def test_bad_input():
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim = 5 and heads = 2"):
        nn.VectorQuantizer(4, 5, heads=2)
    with pytest.raises(ValueError, match=r"x must have 3 channels in dimension -1, got shape \(4, 5\)"):
        nn.VectorQuantizer(4, 3)(torch.zeros(4, 5))


# -- residual levels --------------------------------------------------------------------------------------------------


def test_levels_are_residual_quantize():
    torch.manual_seed(0)
    quantizer = nn.ResidualVectorQuantizer(3, 7, 4, channel_dim=1, beta=0.5).eval()
    x = latents(2, 4, 9)  # (B, D, T)
    out = quantizer(x)
    books = quantizer.codebooks.view(3, 7, 4)
    expected = mk.residual_quantize(x.transpose(1, 2), books, beta=0.5)
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.quantized, expected.quantized.transpose(1, 2))
    torch.testing.assert_close(out.loss, expected.loss / 3)  # 0.5 of 1.5: the commitment loss alone
    torch.testing.assert_close(quantizer.codes_to_embedding(out.indices), out.quantized)
    coarse = mk.residual_quantize(x.transpose(1, 2), books[:2]).quantized.transpose(1, 2)
    torch.testing.assert_close(quantizer.codes_to_embedding(out.indices[..., :2]), coarse)


@pytest.mark.parametrize("options", ({}, {"shared": True}, {"num_codes": (8, 3, 5)}), ids=str)
def test_residual_averages_move_as_the_formula_says(options):
    sizes = options.pop("num_codes", 6)
    quantizer = nn.ResidualVectorQuantizer(3, sizes, 4, decay=0.8, **options)
    shared, levels = quantizer.shared, [sizes] * 3 if isinstance(sizes, int) else sizes
    books = [b.double() for b in quantizer.codebooks.split(6 if shared else levels)] * (3 if shared else 1)
    size, total = [torch.ones(len(b)).double() for b in books], [b.clone() for b in books]
    for step in range(3):
        x = latents(40, 4, seed=step)
        out = quantizer(x)
        residual, hots, rests = x.double(), [], []
        for b in books:
            hots.append(F.one_hot((residual[:, None] - b[None]).square().sum(-1).argmin(1), len(b)).double())
            rests.append(residual)
            residual = residual - hots[-1] @ b
        torch.testing.assert_close(out.quantized.double(), x.double() - residual, rtol=1e-5, atol=1e-5)
        counts, sums = [h.sum(0) for h in hots], [h.T @ r for h, r in zip(hots, rests, strict=True)]
        if shared:
            counts, sums = [sum(counts)] * 3, [sum(sums)] * 3
        for level, b in enumerate(books):
            size[level] = 0.8 * size[level] + 0.2 * counts[level]
            total[level] = 0.8 * total[level] + 0.2 * sums[level]
            n = size[level].sum()
            books[level] = total[level] / ((size[level] + 1e-5) / (n + len(b) * 1e-5) * n)[:, None]
        expected = books[0] if shared else torch.cat(books)
        torch.testing.assert_close(quantizer.codebooks.double(), expected, rtol=1e-4, atol=1e-5)


def test_residual_gradients_are_of_the_codebooks_before_their_update():
    quantizer, x = nn.ResidualVectorQuantizer(3, 6, 4), latents(20, 4).requires_grad_()
    before = quantizer.codebooks.clone().view(3, 6, 4)
    out = quantizer(x)
    (out.quantized.sum() + out.loss.sum()).backward()
    y = x.detach().requires_grad_()
    again = mk.residual_quantize(y, before)
    (again.quantized.sum() + again.loss.sum()).backward()
    assert torch.equal(x.grad, y.grad) and not torch.equal(quantizer.codebooks.view(3, 6, 4), before)


def test_learned_residual_codebooks():
    quantizer = nn.ResidualVectorQuantizer(3, (4, 6, 5), 4, ema=False)
    quantizer(latents(20, 4)).loss.sum().backward()
    assert quantizer.codebooks.grad.shape == (15, 4) and [n for n, _ in quantizer.named_parameters()] == ["codebooks"]
    assert quantizer.batch_usage().usage.shape == (3,) and quantizer.batch_counts.sum() == 60


def test_levels_are_dropped_for_some_samples_in_training_only():
    quantizer = nn.ResidualVectorQuantizer(4, 8, 3, level_dropout=0.5)
    x = latents(400, 2, 3)
    depth = (quantizer(x).indices[:, 0] >= 0).sum(-1)
    assert not torch.equal(depth, (quantizer(x).indices[:, 0] >= 0).sum(-1))  # drawn anew
    share = torch.bincount(depth, minlength=5) / 400
    expected = torch.tensor([0, 0.125, 0.125, 0.125, 0.625])
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 400).sqrt() + 1e-9).all()
    quantizer.eval()
    assert (quantizer(x).indices >= 0).all() and (quantizer(x, levels=2).indices[..., 2:] == -1).all()


def test_residual_kmeans_start_dead_codes_and_half():
    x = latents(300, 4) + 10 * latents(6, 4, seed=1).repeat(50, 1)
    quantizer = nn.ResidualVectorQuantizer(2, 6, 4, dead_code_threshold=0.5)
    far = quantizer.eval()(x).loss
    quantizer.initialize(x, KEY)
    assert (quantizer(x).loss < far / 4).all()
    quantizer.train().codebooks.add_(1000)
    for _ in range(200):
        quantizer(x)
    assert (quantizer.codebooks.abs() < 100).all()
    assert quantizer.half().codebooks.dtype == torch.float32


def test_residual_checkpoint_and_compile():
    torch.manual_seed(0)
    quantizer = nn.ResidualVectorQuantizer(3, 8, 4, dead_code_threshold=1.0, level_dropout=0.5)
    twin = copy.deepcopy(quantizer)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = latents(30, 4, seed=step)
        assert torch.equal(compiled(x).quantized, twin(x).quantized)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.state_dict().values(), twin.state_dict().values(), strict=True))


def test_residual_bad_input():
    with pytest.raises(ValueError, match="num_codes must be an int or one number for each of num_levels = 3"):
        nn.ResidualVectorQuantizer(3, (4, 5), 6)
    with pytest.raises(ValueError, match="num_codes must be one number if shared"):
        nn.ResidualVectorQuantizer(2, (4, 5), 6, shared=True)
    with pytest.raises(ValueError, match="level_dropout must be 0 to 1, got 2"):
        nn.ResidualVectorQuantizer(2, 4, 6, level_dropout=2)


# -- ranks ------------------------------------------------------------------------------------------------------------

BATCH, STEPS = 64, 6


def make(kind):
    torch.manual_seed(0)
    if kind == "residual":
        return nn.ResidualVectorQuantizer(3, 12, 6, decay=0.7, dead_code_threshold=0.8, level_dropout=0.5, seed=3)
    return nn.EMAVectorQuantizer(24, 6, heads=2 if kind == "heads" else None, decay=0.7, dead_code_threshold=0.8, seed=3)


def trained(rank, world, kind):
    """The state after some steps on this rank's part of each batch, and what was counted."""
    quantizer = make(kind)
    quantizer.initialize(latents(BATCH, 6, seed=99).chunk(world)[rank], KEY, iterations=3)
    for step in range(STEPS):
        quantizer(latents(BATCH, 6, seed=step).chunk(world)[rank])
    return {**quantizer.state_dict(), "epoch_counts": quantizer.epoch_counts}


def rank_process(rank, world, path, kind):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world)
    torch.save(trained(rank, world, kind), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ("one", "heads", "residual"))
def test_two_ranks_end_with_the_bits_of_one_process(tmp_path, kind):
    mp.spawn(rank_process, (2, str(tmp_path), kind), nprocs=2)
    alone = trained(0, 1, kind)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        assert state.keys() == alone.keys()
        assert all(torch.equal(state[name], value) for name, value in alone.items())
    assert alone["epoch_counts"].sum() > BATCH * STEPS / 2
