"""vector_quantize beyond the battery: the formulas by hand, gradients against autograd, what the docstring promises."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.battery.vq.vector_quantize import RUNS
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.vq import ops, reference

IMPLEMENTATIONS = battery.implementations("vector_quantize", torch.device("cpu"))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def inputs(n=23, k=7, d=6, dtype=torch.float64, heads=None):
    leading = () if heads is None else (heads,)
    x, codebook = randn(*leading, n, d, seed=1).to(dtype), randn(*leading, k, d, seed=2).to(dtype)
    return x.requires_grad_(), codebook.requires_grad_()


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_losses_and_gradients_by_hand(implementation):
    x = torch.tensor([[1.0, 2.0], [5.0, 5.0], [9.0, 9.0]], requires_grad=True)
    codebook = torch.tensor([[0.0, 0.0], [4.0, 7.0], [8.0, 8.0]], requires_grad=True)
    mask = torch.tensor([True, True, False])
    out = mk.vector_quantize(x, codebook, beta=0.5, mask=mask)
    assert out.indices.tolist() == [0, 1, -1]
    assert out.quantized.tolist() == [[0, 0], [4, 7], [0, 0]]
    # squares 1 + 4 + 1 + 4, over 2 valid rows of 2
    assert (out.commitment_loss.item(), out.codebook_loss.item(), out.loss.item()) == (2.5, 2.5, 3.75)
    (out.quantized * torch.tensor([[1.0, 10.0], [100.0, 1000.0], [7.0, 7.0]])).sum().backward(retain_graph=True)
    assert x.grad.tolist() == [[1, 10], [100, 1000], [0, 0]]
    assert codebook.grad is None or not codebook.grad.any()
    x.grad = codebook.grad = None
    out.loss.backward()
    # 2 (x - c) / 4, times beta for x
    assert x.grad.tolist() == [[0.25, 0.5], [0.25, -0.5], [0, 0]]
    assert codebook.grad.tolist() == [[-0.5, -1], [-0.5, 1], [0, 0]]


@pytest.mark.parametrize("legacy_beta", (False, True))
def test_beta_weighs_one_loss(implementation, legacy_beta):
    x, codebook = inputs()
    out = mk.vector_quantize(x, codebook, beta=0.125, legacy_beta=legacy_beta)
    of_x, of_codebook = torch.autograd.grad(out.loss, (x, codebook), retain_graph=True)
    (commitment,) = torch.autograd.grad(out.commitment_loss, x, retain_graph=True)
    (codes,) = torch.autograd.grad(out.codebook_loss, codebook)
    torch.testing.assert_close(of_x, commitment * (1.0 if legacy_beta else 0.125), rtol=1e-13, atol=0)
    torch.testing.assert_close(of_codebook, codes * (0.125 if legacy_beta else 1.0), rtol=1e-13, atol=0)
    assert out.loss.item() == pytest.approx(1.125 * out.codebook_loss.item(), rel=1e-14)


def test_each_loss_reaches_one_input_only(implementation):
    x, codebook = inputs()
    out = mk.vector_quantize(x, codebook)
    for loss, blind in ((out.commitment_loss, codebook), (out.codebook_loss, x), (out.quantized.sum(), codebook)):
        (grad,) = torch.autograd.grad(loss, blind, retain_graph=True, allow_unused=True)
        assert grad is None or not grad.any()


def test_straight_through_is_the_identity(implementation):
    x, codebook = inputs(dtype=torch.float32)
    upstream = torch.randn(23, 6)
    (grad,) = torch.autograd.grad(mk.vector_quantize(x, codebook).quantized, x, upstream)
    assert torch.equal(grad, upstream)


def test_rotation_turns_and_stretches_the_gradient(implementation):
    """The defining properties: R carries e to q, so that dq = c gives dx = s^2 x; and dx is s times as long as dq."""
    x, codebook = inputs(d=9)
    out = mk.vector_quantize(x, codebook, gradient="rotation")
    codes = out.quantized.detach()
    s = codes.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True)
    (grad,) = torch.autograd.grad(out.quantized, x, codes, retain_graph=True)
    torch.testing.assert_close(grad, s.square() * x.detach(), rtol=1e-12, atol=1e-12)
    upstream = randn(*x.shape, seed=5)
    (grad,) = torch.autograd.grad(out.quantized, x, upstream)
    torch.testing.assert_close(grad.norm(dim=-1), (s * upstream.norm(dim=-1, keepdim=True))[:, 0], rtol=1e-12, atol=0)
    assert not torch.allclose(grad, upstream)


def test_rotation_that_does_not_exist_passes_straight_through(implementation):
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for codebook in ([[0.0, 0.0]], [[3.0, 0.0]]):  # a zero code, a zero row, and x = -c
        codebook = torch.tensor(codebook, dtype=torch.float64)
        upstream = randn(3, 2, seed=3)
        (grad,) = torch.autograd.grad(mk.vector_quantize(x, codebook, gradient="rotation").quantized, x, upstream)
        straight = [0, 1, 2] if codebook[0, 0] == 0 else [0, 2]
        assert torch.equal(grad[straight], upstream[straight]) and grad.isfinite().all()


# -- gradients against autograd ---------------------------------------------------------------------------------------

WANTED = [c for r in (1, 2, 3, 4) for c in itertools.combinations(("quantized", "loss", "commitment_loss", "codebook_loss"), r)]


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
@pytest.mark.parametrize("legacy_beta", (False, True))
@pytest.mark.parametrize("heads", (None, 3))
@pytest.mark.parametrize("masked", (False, True))
def test_backward_is_autograd_of_the_reference(implementation, gradient, legacy_beta, heads, masked):
    """The handwritten backward, for every subset of outputs, against autograd through the differentiable reference, in fp64."""
    x, codebook = inputs(heads=heads)
    mask = randn(*x.shape[:-1], seed=4) > -0.5 if masked else None
    upstream = randn(*x.shape, seed=5)
    options = {"beta": 0.3, "legacy_beta": legacy_beta, "gradient": gradient, "metric": "l2"}
    ours = mk.vector_quantize(x, codebook, mask=mask, **options)
    theirs = mk.VQOutput(*reference.vector_quantize(x, codebook, mask, *options.values(), "exact"))
    for wanted in WANTED:
        for of in ((x,), (codebook,), (x, codebook)):
            grads = []
            for out in (ours, theirs):
                tensors = [getattr(out, name) for name in wanted]
                weights = [upstream if t.dim() else torch.tensor(0.5 + i, dtype=t.dtype) for i, t in enumerate(tensors)]
                grads.append(torch.autograd.grad(tensors, of, weights, retain_graph=True, allow_unused=True))
            for got, true, like in zip(*grads, of, strict=True):
                got, true = (torch.zeros_like(like) if g is None else g for g in (got, true))
                torch.testing.assert_close(got, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("legacy_beta", (False, True))
@pytest.mark.parametrize("heads", (None, 2))
@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck_of_the_losses(implementation, legacy_beta, heads, masked):
    """Away from the borders between codes the losses are smooth; what is stopped for one input is constant for the other."""
    x, codebook = inputs(n=5, k=3, d=4, heads=heads)
    mask = randn(*x.shape[:-1], seed=4) > -0.5 if masked else None
    fixed = mk.vector_quantize(x, codebook, mask=mask).indices

    def loss_of_x(x):
        out = mk.vector_quantize(x, codebook.detach(), legacy_beta=legacy_beta, mask=mask)
        assert torch.equal(out.indices, fixed)
        return out.commitment_loss

    def loss_of_codebook(codebook):
        out = mk.vector_quantize(x.detach(), codebook, legacy_beta=legacy_beta, mask=mask)
        assert torch.equal(out.indices, fixed)
        return out.codebook_loss

    assert torch.autograd.gradcheck(loss_of_x, (x,)) and torch.autograd.gradcheck(loss_of_codebook, (codebook,))


def test_gradients_that_arrive_expanded_or_transposed(implementation):
    x, codebook = inputs(dtype=torch.float32)
    out = mk.vector_quantize(x, codebook).quantized
    (expanded,) = torch.autograd.grad(out.sum(), x, retain_graph=True)  # a gradient with strides (0, 0)
    assert torch.equal(expanded, torch.ones_like(x))
    upstream = torch.randn(6, 23)
    (transposed,) = torch.autograd.grad(out.t(), x, upstream, retain_graph=True)
    assert torch.equal(transposed, upstream.t())


@pytest.mark.parametrize(("of_x", "of_codebook"), [(True, False), (False, True)])
def test_one_input_without_gradient(implementation, of_x, of_codebook):
    x, codebook = (t.detach().requires_grad_(need) for t, need in zip(inputs(), (of_x, of_codebook), strict=True))
    both = inputs()
    mk.vector_quantize(x, codebook).loss.backward()
    mk.vector_quantize(*both).loss.backward()
    for tensor, other in zip((x, codebook), both, strict=True):
        assert (tensor.grad is None) if not tensor.requires_grad else torch.equal(tensor.grad, other.grad)


def test_no_gradient_mode(implementation):
    x, codebook = inputs()
    with torch.no_grad():
        assert not mk.vector_quantize(x, codebook).quantized.requires_grad
    with torch.inference_mode():
        assert mk.vector_quantize(x, codebook).quantized.is_inference()
    assert not mk.vector_quantize(x, codebook).indices.requires_grad


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_dtypes_of_everything(implementation, dtypes):
    x, codebook = (t.requires_grad_() for t in DATA_SETS["gaussian"](9, 5, 4, *dtypes))
    out = mk.vector_quantize(x, codebook)
    (out.loss + out.quantized.sum()).backward()
    promoted = torch.promote_types(*dtypes)
    wide = torch.promote_types(promoted, torch.float32)
    assert (out.quantized.dtype, out.indices.dtype) == (promoted, torch.int64)
    assert {out.loss.dtype, out.commitment_loss.dtype, out.codebook_loss.dtype} == {wide}
    assert (x.grad.dtype, codebook.grad.dtype) == dtypes


def test_checkpointed(implementation):
    """Activation checkpointing runs the forward twice."""
    results = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)):
        x, codebook = inputs(dtype=torch.float32)
        loss = wrap(lambda a, b: mk.vector_quantize(a * 2, b, gradient="rotation")[::2], x, codebook)
        (loss[0].square().sum() + loss[1]).backward()
        results.append((x.grad, codebook.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_global_defaults_change_nothing(implementation, dtype):
    """torch.set_default_dtype and a default device are other people's business."""
    x, codebook = inputs(dtype=torch.float32)
    expected = [mk.vector_quantize(x, codebook, metric=metric, gradient="rotation") for metric in ops.METRICS]
    gradients = torch.autograd.grad(expected[0].loss, (x, codebook))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = [mk.vector_quantize(x, codebook, metric=metric, gradient="rotation") for metric in ops.METRICS]
            for a, b in zip(torch.autograd.grad(got[0].loss, (x, codebook)), gradients, strict=True):
                assert same_bits(a, b)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(got, expected, strict=True):
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(a, b, strict=True))


def test_several_threads_at_once(implementation):
    """Data loaders and servers call from threads of their own."""
    x, codebook = (t.detach() for t in inputs(n=3000, k=200, d=16, dtype=torch.float32))
    expected = mk.vector_quantize(x, codebook)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: mk.vector_quantize(x, codebook), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


# -- edges ------------------------------------------------------------------------------------------------------------


def test_no_valid_row(implementation):
    for x, mask in ((torch.randn(4, 3), torch.zeros(4, dtype=torch.bool)), (torch.randn(0, 3), None), (torch.randn(2, 0, 3), None)):
        x.requires_grad_()
        codebook = torch.randn(5, 3, requires_grad=True)
        out = mk.vector_quantize(x, codebook, mask=mask, gradient="rotation")
        assert out.loss.item() == out.commitment_loss.item() == out.codebook_loss.item() == 0
        assert (out.indices == -1).all() and not out.quantized.any() and out.quantized.shape == x.shape
        (out.loss + out.quantized.sum()).backward()
        assert x.grad.shape == x.shape and not x.grad.any() and not codebook.grad.any()


def test_masked_rows_have_no_share(implementation):
    x, codebook = inputs(dtype=torch.float32)
    mask = torch.arange(23) % 3 != 0
    poisoned = x.detach().clone()
    poisoned[~mask] = torch.nan
    poisoned.requires_grad_()
    out, alone = mk.vector_quantize(poisoned, codebook, mask=mask), mk.vector_quantize(x.detach()[mask].requires_grad_(), codebook)
    assert (out.indices[~mask] == -1).all() and not out.quantized[~mask].any()
    assert torch.equal(out.indices[mask], alone.indices) and torch.equal(out.quantized[mask], alone.quantized)
    torch.testing.assert_close(out.loss, alone.loss, rtol=1e-6, atol=0)
    (out.loss + out.quantized.sum()).backward()
    assert not poisoned.grad[~mask].any() and poisoned.grad.isfinite().all() and codebook.grad.isfinite().all()


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_rows_that_are_not_finite(implementation, value):
    x, codebook = inputs(dtype=torch.float32)
    rows = x.detach().clone()
    rows[4, 2] = value
    rows.requires_grad_()
    out, clean = mk.vector_quantize(rows, codebook), mk.vector_quantize(x, codebook)
    others = torch.arange(23) != 4
    assert out.indices[4] == 0 and out.quantized[4].isnan().all() and not out.loss.isfinite()
    assert torch.equal(out.quantized[others], clean.quantized[others]) and torch.equal(out.indices[others], clean.indices[others])
    out.loss.backward()
    clean.loss.backward()
    # the row and the code it fell to lose their gradients, nothing else does
    untouched = torch.arange(7) != 0
    torch.testing.assert_close(rows.grad[others], x.grad[others], rtol=1e-6, atol=0)
    assert rows.grad[4].isnan().all() and codebook.grad.isnan()[0].all()
    assert codebook.grad[untouched].isfinite().all()


def test_codes_bit_for_bit(implementation):
    codebook = torch.tensor([[-0.0, 1e-45], [0.0, 3.0]])
    x = torch.zeros(1, 2, requires_grad=True)
    for gradient in ops.GRADIENTS:
        quantized = mk.vector_quantize(x, codebook, gradient=gradient).quantized
        assert same_bits(quantized.detach(), codebook[:1])


def test_inputs_are_not_written(implementation):
    x, codebook = inputs(dtype=torch.float32)
    mask = torch.rand(23) > 0.3
    before = [(t.detach().clone(), t._version) for t in (x, codebook, mask)]
    upstream = torch.randn(23, 6)
    out = mk.vector_quantize(x, codebook, mask=mask, gradient="rotation")
    kept = upstream.clone(), [t.detach().clone() for t in out]
    torch.autograd.backward((out.quantized, out.loss), (upstream, torch.tensor(1.0)))
    for tensor, (copy, version) in zip((x, codebook, mask), before, strict=True):
        assert torch.equal(tensor.detach(), copy) and tensor._version == version
    assert torch.equal(upstream, kept[0]) and all(torch.equal(a.detach(), b) for a, b in zip(out, kept[1], strict=True))


def test_codebook_written_between_forward_and_backward(implementation):
    """EMA: the codebook moves in place while the graph still waits for its backward."""
    x, codebook = inputs(dtype=torch.float32)
    untouched = inputs(dtype=torch.float32)
    out, same = mk.vector_quantize(x, codebook), mk.vector_quantize(*untouched)
    with torch.no_grad():
        codebook.mul_(0.5).add_(1)
    (out.loss + out.quantized.sum()).backward()
    (same.loss + same.quantized.sum()).backward()
    assert torch.equal(x.grad, untouched[0].grad) and torch.equal(codebook.grad, untouched[1].grad)


def test_outputs_written_before_the_backward_are_noticed(implementation):
    """quantized is kept for the backward: autograd must refuse rather than use what was written over it."""
    x, codebook = inputs()
    out = mk.vector_quantize(x, codebook)
    with torch.no_grad():
        out.quantized.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_codebook_gradient_has_the_same_bits_in_every_run_on_any_threads(implementation, dtype):
    """15000 rows for 5 codes: any order but the rows' own would show."""
    x, codebook = (randn(n, 8, seed=n).to(dtype).requires_grad_() for n in (15_000, 5))

    def gradient(threads):
        torch.set_num_threads(threads)
        return torch.autograd.grad(mk.vector_quantize(x, codebook).loss, codebook)[0]

    first = gradient(1)
    assert all(same_bits(gradient(1 + run % 3), first) for run in range(RUNS))


def test_losses_do_not_depend_on_threads(implementation):
    x, codebook = inputs(n=20_000, d=8, dtype=torch.float32)
    losses = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        losses.append(mk.vector_quantize(x, codebook).loss.item())
    assert len(set(losses)) == 1


def test_a_row_does_not_depend_on_its_batch(implementation):
    x, codebook = inputs(n=300, d=16, dtype=torch.float32)
    upstream = torch.randn(300, 16)
    whole = mk.vector_quantize(x, codebook, gradient="rotation").quantized
    (grad,) = torch.autograd.grad(whole, x, upstream)
    for rows in (slice(0, 1), slice(17, 50), slice(299, 300)):
        part = x.detach()[rows].requires_grad_()
        quantized = mk.vector_quantize(part, codebook, gradient="rotation").quantized
        assert torch.equal(quantized, whole[rows])
        assert torch.equal(torch.autograd.grad(quantized, part, upstream[rows])[0], grad[rows])
