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


# -- ranks ------------------------------------------------------------------------------------------------------------

BATCH, STEPS = 64, 6


def trained(rank, world, heads):
    """The state after some steps on this rank's part of each batch, and what was counted."""
    torch.manual_seed(0)
    quantizer = nn.EMAVectorQuantizer(24, 6, heads=heads, decay=0.7, dead_code_threshold=0.8, seed=3)
    quantizer.initialize(latents(BATCH, 6, seed=99).chunk(world)[rank], KEY, iterations=3)
    for step in range(STEPS):
        quantizer(latents(BATCH, 6, seed=step).chunk(world)[rank])
    return {**quantizer.state_dict(), "epoch_counts": quantizer.epoch_counts}


def rank_process(rank, world, path, heads):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world)
    torch.save(trained(rank, world, heads), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("heads", (None, 2))
def test_two_ranks_end_with_the_bits_of_one_process(tmp_path, heads):
    mp.spawn(rank_process, (2, str(tmp_path), heads), nprocs=2)
    alone = trained(0, 1, heads)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        assert state.keys() == alone.keys()
        assert all(torch.equal(state[name], value) for name, value in alone.items())
    assert alone["epoch_counts"].sum() == BATCH * STEPS * (heads or 1)
