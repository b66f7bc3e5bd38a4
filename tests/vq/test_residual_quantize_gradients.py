"""Gradients of residual_quantize: against autograd, by their defining properties, and what is kept for them."""

import itertools

import pytest
import torch
from test_residual_quantize import IMPLEMENTATIONS, assert_same, inputs

import mmgen_kernels as mk
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.vq.residual_quantize import gaussian
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.vq import ops, reference


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
@pytest.mark.parametrize("form", ("stacked", "sizes", "shared"))
@pytest.mark.parametrize("chosen", ("all", "masked", "levels"))
def test_backward_is_autograd_of_the_reference(implementation, gradient, form, chosen):
    """The handwritten backward, for every subset of outputs, against autograd through the differentiable reference, in fp64."""
    x, codebooks = inputs(n=24)
    x = x.detach().view(4, 6, 6).requires_grad_()
    if form != "stacked":
        codebooks = (codebooks.detach().flatten(0, 1) if form == "sizes" else codebooks.detach()[0]).requires_grad_()
    books = codebooks.expand(3, 7, 6) if form == "shared" else codebooks
    sizes = [3, 8, 10] if form == "sizes" else []
    mask = randn(4, 6, seed=4) > -0.5 if chosen == "masked" else None
    levels = torch.tensor([3, 1, 0, 2]) if chosen == "levels" else None
    upstream = randn(*x.shape, seed=5)
    options = {"beta": 0.3, "gradient": gradient, "metric": "l2"}
    given = books.split(sizes) if sizes else books
    ours = mk.residual_quantize(x, given, mask=mask, levels=levels, **options)
    theirs = reference.residual_quantize(x, books, sizes, levels, mask, 3, *options.values(), "exact", False)
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    for wanted in ((0,), (2,), (0, 2)):
        for of in ((x,), (codebooks,), (x, codebooks)):
            grads = []
            for out in (ours, theirs):
                tensors = [out[i] for i in wanted]
                given = [upstream if i == 0 else weights for i in wanted]
                grads.append(torch.autograd.grad(tensors, of, given, retain_graph=True, allow_unused=True))
            for got, true, like in zip(*grads, of, strict=True):
                got, true = (torch.zeros_like(like) if g is None else g for g in (got, true))
                torch.testing.assert_close(got, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck_of_the_losses(implementation, masked):
    """Each input with what counts as constant for it held fixed."""
    x, codebooks = inputs(n=5, k=3, d=4)
    mask = randn(5, seed=4) > -0.5 if masked else None
    fixed = mk.residual_quantize(x, codebooks, mask=mask).indices

    def losses(x, codebooks, beta):
        out = mk.residual_quantize(x, codebooks, beta=beta, mask=mask)
        assert torch.equal(out.indices, fixed)
        return out.loss

    books = codebooks.detach()
    # beta = 0 leaves the codebook losses, and beta = 1 adds the commitment losses to them
    assert torch.autograd.gradcheck(lambda x: losses(x, books, 1.0) - losses(x, books, 0.0).detach(), (x,))
    for level in range(3):  # the codes of other levels move the residual, which counts as constant

        def of_level(book, level=level):
            return losses(x.detach(), torch.cat([books[:level], book[None], books[level + 1 :]]), 0.0)[level]

        assert torch.autograd.gradcheck(of_level, (books[level].clone().requires_grad_(),))


def test_straight_through_is_the_identity(implementation):
    x, codebooks = inputs(dtype=torch.float32)
    upstream = torch.randn(23, 6)
    (gradient,) = torch.autograd.grad(mk.residual_quantize(x, codebooks).quantized, x, upstream)
    assert torch.equal(gradient, upstream)


def test_rotation_turns_from_x_to_the_sum(implementation):
    """R carries x / |x| to q / |q|, so that dq = q gives dx = s^2 x, with q the sum over all levels."""
    x, codebooks = inputs()
    quantized = mk.residual_quantize(x, codebooks, gradient="rotation").quantized
    q = quantized.detach()
    s = q.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True)
    (gradient,) = torch.autograd.grad(quantized, x, q)
    torch.testing.assert_close(gradient, s.square() * x.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_dtypes_of_everything(implementation, dtypes):
    x, codebooks = (t.requires_grad_() for t in gaussian(9, 5, 4, dtypes, levels=2))
    out = mk.residual_quantize(x, codebooks, statistics=True)
    (out.loss.sum() + out.quantized.sum()).backward()
    promoted = torch.promote_types(*dtypes)
    wide = torch.promote_types(promoted, torch.float32)
    assert (out.quantized.dtype, out.indices.dtype, out.counts.dtype) == (promoted, torch.int64, torch.int64)
    assert (out.loss.dtype, out.sums.dtype) == (wide, wide)
    assert (x.grad.dtype, codebooks.grad.dtype) == dtypes


def test_gradients_that_arrive_expanded_or_transposed(implementation):
    x, codebooks = inputs(dtype=torch.float32)
    out = mk.residual_quantize(x, codebooks)
    (expanded,) = torch.autograd.grad(out.quantized.sum(), x, retain_graph=True)
    assert torch.equal(expanded, torch.ones_like(x))
    upstream = torch.randn(6, 23)
    (transposed,) = torch.autograd.grad(out.quantized.t(), x, upstream, retain_graph=True)
    assert torch.equal(transposed, upstream.t())
    total = torch.autograd.grad(out.loss.sum(), (x, codebooks), retain_graph=True)  # a gradient with stride 0
    assert_same(total, torch.autograd.grad(out.loss, (x, codebooks), torch.ones(3)))


@pytest.mark.parametrize(("of_x", "of_codebooks"), [(True, False), (False, True)])
def test_one_input_without_gradient(implementation, of_x, of_codebooks):
    x, codebooks = (t.detach().requires_grad_(need) for t, need in zip(inputs(), (of_x, of_codebooks), strict=True))
    both = inputs()
    mk.residual_quantize(x, codebooks).loss.sum().backward()
    mk.residual_quantize(*both).loss.sum().backward()
    for tensor, other in zip((x, codebooks), both, strict=True):
        assert (tensor.grad is None) if not tensor.requires_grad else torch.equal(tensor.grad, other.grad)


def test_what_has_no_gradient(implementation):
    x, codebooks = inputs()
    out = mk.residual_quantize(x, codebooks, statistics=True)
    assert not out.indices.requires_grad and not out.counts.requires_grad and not out.sums.requires_grad
    assert mk.residual_quantize(x, codebooks)[3:] == (None, None)
    with torch.no_grad():
        assert not mk.residual_quantize(x, codebooks).quantized.requires_grad


def ema(codebooks):
    with torch.no_grad():
        codebooks.mul_(0.5).add_(1)


@pytest.mark.parametrize("need", ("x", "both"))
def test_codebooks_written_before_the_backward_are_noticed(implementation, need):
    """They are kept for the backward: autograd must refuse rather than compute other residuals than the forward's."""
    x, codebooks = inputs(dtype=torch.float32)
    codebooks.requires_grad_(need == "both")
    out = mk.residual_quantize(x, codebooks)
    ema(codebooks)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


def test_ema_on_a_clone_or_after_the_backward(implementation):
    """The two ways that the docstring names give the gradient of the codebooks that the forward saw."""
    x, codebooks = inputs(dtype=torch.float32)
    codebooks.requires_grad_(False)
    gradients = []
    for early in (True, False):
        books = codebooks.clone()
        out = mk.residual_quantize(x, books.clone() if early else books)
        if early:
            ema(books)
        gradients += torch.autograd.grad(out.loss.sum() + out.quantized.sum(), x)
        ema(books)
    assert torch.equal(*gradients) and gradients[0].any()


def test_compiled_step_with_codebooks_written_in_place(implementation):
    """The update inside one compiled step: the graph keeps what the forward saw."""

    def step(x, books):
        out = mk.residual_quantize(x, books.clone(), statistics=True)
        books.mul_(0.9).add_(out.sums, alpha=0.1)
        return out.loss.sum(), out.indices

    x, codebooks = (t.detach() for t in inputs(dtype=torch.float32))
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        books, rows = codebooks.clone(), x.clone().requires_grad_()
        loss, indices = call(rows, books)
        loss.backward()
        results.append((loss, indices, rows.grad, books))
    assert_same(*results)


def test_results_may_be_written_before_the_backward(implementation):
    """Only x, the codebooks and the indices are kept."""
    x, codebooks = inputs(dtype=torch.float32)
    (expected,) = torch.autograd.grad(mk.residual_quantize(x, codebooks).quantized.sum(), x)
    quantized = mk.residual_quantize(x, codebooks).quantized
    quantized.mul_(1.0)
    (got,) = torch.autograd.grad(quantized.sum(), x)
    assert torch.equal(got, expected)


def test_inputs_are_not_written(implementation):
    x, codebooks = inputs(dtype=torch.float32)
    mask, levels = torch.rand(23) > 0.3, torch.randint(0, 4, (23,))
    before = [(t.detach().clone(), t._version) for t in (x, codebooks, mask, levels)]
    out = mk.residual_quantize(x, codebooks, mask=mask, levels=levels, gradient="rotation", statistics=True)
    (out.quantized.sum() + out.loss.sum()).backward()
    for tensor, (copy, version) in zip((x, codebooks, mask, levels), before, strict=True):
        assert torch.equal(tensor.detach(), copy) and tensor._version == version


@pytest.mark.parametrize("overload", ("default", "reference"))
def test_backward_takes_any_layout_and_clamps_indices(overload):
    """Only a direct call brings transposed indices, indices out of range, or rows that leave a level out and take the next."""
    backward = OPERATORS["residual_quantize_backward"].overloads[overload]
    x, upstream, codebooks = inputs(n=10, d=4)[0].view(5, 2, 4), randn(5, 2, 4, seed=3), inputs(d=4)[1]
    indices = torch.randint(-1, 7, (5, 2, 3))
    indices[0, 0], indices[1, 1] = 6, -1
    wild = indices.clone()
    wild[0, 0], wild[1, 1] = 2**40, -(2**40)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (upstream, x, wild)]
    results = []
    ones = torch.ones(1, dtype=torch.float64).expand(3)
    for g, rows, given in ((upstream, x, indices), (upstream, x, wild), turned):
        results.append(backward(g, ones, rows.detach(), codebooks.detach(), given, [], 0.25, "rotation", True, True))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    out = reference.quantize_levels(x, codebooks, [], lambda level, _: indices[..., level], 0.25, "rotation", False)
    expected = torch.autograd.grad((out[0], out[2]), (x, codebooks), (upstream, ones))
    for got, true in zip(results[0], expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-11, atol=1e-13)
