"""residual_quantize beyond the battery: the formulas by hand, the definition level by level, what the docstring promises."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.vq.data import DATA_SETS, randn
from mmgen_kernels.battery.vq.residual_quantize import gaussian
from mmgen_kernels.battery.vq.vector_quantize import RUNS, same_bits
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.vq import ops, reference

IMPLEMENTATIONS = battery.implementations("residual_quantize", torch.device("cpu"))
FP32 = (torch.float32, torch.float32)
META = torch.device("meta")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def inputs(n=23, k=7, d=6, levels=3, dtype=torch.float64):
    x, codebooks = gaussian(n, k, d, (dtype, dtype), levels=levels)
    return x.requires_grad_(), codebooks.requires_grad_()


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- definition -------------------------------------------------------------------------------------------------------


def test_losses_and_gradients_by_hand(implementation):
    x = torch.tensor([[5.0, 2.0], [1.0, 0.0], [9.0, 9.0]], requires_grad=True)
    codebooks = torch.tensor([[[0.0, 0.0], [4.0, 4.0]], [[1.0, -1.0], [8.0, 8.0]]], requires_grad=True)
    mask, levels = torch.tensor([True, True, False]), torch.tensor([2, 1, 2])
    out = mk.residual_quantize(x, codebooks, beta=0.5, mask=mask, levels=levels, statistics=True)
    assert out.indices.tolist() == [[1, 0], [0, -1], [-1, -1]]
    assert out.quantized.tolist() == [[5, 3], [0, 0], [0, 0]]
    # level 0: rests (1, -2) and (1, 0) of two rows; level 1: rest (0, -1) of one row
    assert out.loss.tolist() == [1.5 * 6 / 4, 1.5 * 1 / 2]
    assert out.counts.tolist() == [[1, 1], [1, 0]]
    assert out.sums.tolist() == [[[1, 0], [5, 2]], [[1, -2], [0, 0]]]
    (out.quantized * torch.tensor([[1.0, 10.0], [100.0, 1000.0], [7.0, 7.0]])).sum().backward(retain_graph=True)
    assert x.grad.tolist() == [[1, 10], [100, 1000], [0, 0]]
    assert codebooks.grad is None or not codebooks.grad.any()
    x.grad = codebooks.grad = None
    out.loss.backward(torch.tensor([1.0, 10.0]))
    # 2 rest / (M D), times beta for x: (1, -2) / 2 and 10 (0, -1)
    assert x.grad.tolist() == [[0.25, -0.5 - 5], [0.25, 0], [0, 0]]
    assert codebooks.grad.tolist() == [[[-0.5, 0], [-0.5, 1]], [[0, 10], [0, 0]]]


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("precision", ops.PRECISIONS)
@pytest.mark.parametrize("dtypes", (FP32, (torch.bfloat16, torch.float16), (torch.float32, torch.float64)))
def test_every_level_is_nearest_code_of_the_residual(implementation, dtypes, metric, precision):
    x, codebooks = gaussian(65, 33, 24, dtypes)
    wide = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    out = mk.residual_quantize(x, codebooks, metric=metric, precision=precision, statistics=True)
    residual, total = x.to(wide), None
    for level, book in enumerate(codebooks):
        index = mk.nearest_code(residual, book, metric=metric, precision=precision)
        assert torch.equal(out.indices[:, level], index)
        assert torch.equal(out.counts[level], torch.bincount(index, minlength=33))
        sums = torch.zeros(33, 24, dtype=torch.float64)
        for row, code in zip(residual.double(), index.tolist(), strict=True):
            sums[code] += row
        assert same_bits(out.sums[level], sums.to(wide))
        codes = book[index].to(wide)
        residual = residual - codes
        total = codes if total is None else total + codes
    assert same_bits(out.quantized, total.to(torch.promote_types(*dtypes)))


def test_one_level_is_vector_quantize(implementation):
    x, codebooks = inputs(levels=1, dtype=torch.float32)
    x2, codebooks2 = inputs(levels=1, dtype=torch.float32)
    upstream = torch.randn(23, 6)
    one = mk.vector_quantize(x, codebooks[0], gradient="rotation")
    out = mk.residual_quantize(x2, codebooks2, gradient="rotation")
    assert same_bits(out.quantized.detach(), one.quantized.detach()) and torch.equal(out.indices[:, 0], one.indices)
    torch.testing.assert_close(out.loss[0], one.loss, rtol=1e-6, atol=0)
    (one.loss + (one.quantized * upstream).sum()).backward()
    (out.loss.sum() + (out.quantized * upstream).sum()).backward()
    torch.testing.assert_close(x2.grad, x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codebooks2.grad, codebooks.grad, rtol=1e-5, atol=1e-7)


def test_codes_bit_for_bit(implementation):
    codebooks = torch.tensor([[[-0.0, 1e-45]], [[-0.0, 0.0]]])
    for gradient in ops.GRADIENTS:
        quantized = mk.residual_quantize(torch.zeros(1, 2, requires_grad=True), codebooks, gradient=gradient).quantized
        assert same_bits(quantized.detach(), codebooks[0])
        assert not torch.signbit(mk.residual_quantize(torch.zeros(1, 2), codebooks, gradient=gradient, levels=0).quantized).any()


def test_a_shared_codebook(implementation):
    x, codebooks = inputs(dtype=torch.float32)
    shared = codebooks.detach()[0].requires_grad_()
    copies = shared.detach().expand(3, 7, 6).clone().requires_grad_()
    results = []
    for books in (shared.expand(3, 7, 6), copies):
        out = mk.residual_quantize(x, books)
        (gradient,) = torch.autograd.grad(out.loss.sum(), books)
        results.append((*out[:3], gradient))
    assert_same(*results)
    mk.residual_quantize(x, shared.expand(3, 7, 6)).loss.sum().backward()
    torch.testing.assert_close(shared.grad, results[1][3].sum(0), rtol=1e-6, atol=1e-8)


def test_a_sequence_of_codebooks(implementation):
    x, codebooks = inputs(dtype=torch.float32)
    books = [codebooks.detach()[0, :5], codebooks.detach()[1, :1], codebooks.detach()[2]]
    books = [torch.nn.Parameter(book.clone()) for book in books]
    residual, gradients = x.detach(), []
    for book in books:
        one = mk.vector_quantize(residual, book)
        gradients += torch.autograd.grad(one.loss, book)
        residual = residual - book.detach()[one.indices]
    for sequence in (books, tuple(books), torch.nn.ParameterList(books)):
        out = mk.residual_quantize(x, sequence, statistics=True)
        assert [c.shape for c in out.counts] == [(5,), (1,), (7,)]
        assert [s.shape for s in out.sums] == [(5, 6), (1, 6), (7, 6)]
        for got, expected in zip(torch.autograd.grad(out.loss.sum(), books), gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


# -- levels and mask --------------------------------------------------------------------------------------------------


def test_an_int_is_as_many_levels_of_every_sample(implementation):
    x, codebooks = inputs(dtype=torch.float32)
    for levels in range(4):
        out = mk.residual_quantize(x, codebooks, levels=levels, statistics=True)
        each = mk.residual_quantize(x, codebooks, levels=torch.full((23,), levels), statistics=True)
        assert_same(out, each)
        assert (out.indices[:, levels:] == -1).all() and (out.indices[:, :levels] >= 0).all()
        assert not out.loss[levels:].any() and not out.counts[levels:].any() and not out.sums[levels:].any()
        if levels:
            first = mk.residual_quantize(x, codebooks[:levels], statistics=True)
            assert same_bits(out.quantized.detach(), first.quantized.detach())
            assert torch.equal(out.loss[:levels], first.loss)


def test_levels_of_each_sample(implementation):
    """Quantizer dropout: a sample of l levels gets what it would get alone, and the losses are means over those that are left."""
    x, codebooks = gaussian(24, 7, 6, (torch.float32, torch.float32), levels=3)
    x = x.view(4, 2, 3, 6).requires_grad_()
    levels = torch.tensor([1, 3, -5, 70])
    upstream = torch.randn(4, 2, 3, 6)
    out = mk.residual_quantize(x, codebooks, levels=levels)
    (dx,) = torch.autograd.grad(out.quantized, x, upstream, retain_graph=True)
    (of_loss,) = torch.autograd.grad(out.loss[2], x)
    for sample, count in enumerate((1, 3, 0, 3)):
        alone = mk.residual_quantize(x[sample], codebooks, levels=count)
        assert torch.equal(out.indices[sample], alone.indices) and torch.equal(out.quantized[sample], alone.quantized)
        assert torch.equal(dx[sample], upstream[sample] if count else torch.zeros(2, 3, 6))
        assert bool(of_loss[sample].any()) == (count == 3)
    both = mk.residual_quantize(x[[1, 3]], codebooks)
    torch.testing.assert_close(out.loss[2], both.loss[2], rtol=1e-6, atol=0)


def test_masked_rows_have_no_share(implementation):
    x, codebooks = inputs(dtype=torch.float32)
    mask = torch.arange(23) % 3 != 0
    poisoned = torch.where(mask[:, None], x.detach(), torch.nan).requires_grad_()
    out = mk.residual_quantize(poisoned, codebooks, mask=mask, gradient="rotation", statistics=True)
    alone = mk.residual_quantize(x.detach()[mask], codebooks, statistics=True)
    assert (out.indices[~mask] == -1).all() and not out.quantized[~mask].any()
    assert torch.equal(out.indices[mask], alone.indices) and torch.equal(out.quantized[mask], alone.quantized)
    torch.testing.assert_close(out.loss, alone.loss, rtol=1e-6, atol=0)
    assert torch.equal(out.counts, alone.counts) and torch.equal(out.sums, alone.sums)
    (out.loss.sum() + out.quantized.sum()).backward()
    assert not poisoned.grad[~mask].any() and poisoned.grad.isfinite().all() and codebooks.grad.isfinite().all()


def test_no_valid_row(implementation):
    none = torch.zeros(4, dtype=torch.bool)
    for x, options in (
        (torch.randn(4, 3), {"mask": none}),
        (torch.randn(4, 3), {"levels": 0}),
        (torch.randn(4, 3), {"levels": torch.zeros(4, dtype=torch.int64)}),
        (torch.randn(0, 3), {}),
        (torch.randn(2, 0, 3), {"levels": torch.tensor([1, 2])}),
    ):
        x.requires_grad_()
        codebooks = torch.randn(2, 5, 3, requires_grad=True)
        out = mk.residual_quantize(x, codebooks, gradient="rotation", statistics=True, **options)
        assert out.loss.tolist() == [0, 0] and not out.counts.any() and not out.sums.any()
        assert (out.indices == -1).all() and not out.quantized.any() and out.quantized.shape == x.shape
        (out.loss.sum() + out.quantized.sum()).backward()
        assert x.grad.shape == x.shape and not x.grad.any() and not codebooks.grad.any()


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_rows_that_are_not_finite(implementation, value):
    x, codebooks = inputs(dtype=torch.float32)
    rows = x.detach().clone()
    rows[4, 2] = value
    rows.requires_grad_()
    others = torch.arange(23) != 4
    options = {"gradient": "rotation", "statistics": True}
    out, clean = mk.residual_quantize(rows, codebooks, **options), mk.residual_quantize(x, codebooks, mask=others, **options)
    assert out.indices[4].tolist() == [0, 0, 0] and out.quantized[4].isnan().all() and out.loss.isnan().all()
    assert torch.equal(out.quantized[others], clean.quantized[others]) and torch.equal(out.indices[others], clean.indices[others])
    assert not out.sums[:, 0].isfinite().all(-1).any() and torch.equal(out.sums[:, 1:], clean.sums[:, 1:])
    (out.loss.sum() + out.quantized.sum()).backward()
    of_x, x.grad = rows.grad, None
    of_codes, codebooks.grad = codebooks.grad, None
    # the row and the codes it fell to lose their gradients, nothing else does; it is one of 23 rows, and was none of 22
    (clean.loss.sum() * 22 / 23 + clean.quantized.sum()).backward()
    torch.testing.assert_close(of_x[others], x.grad[others], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_codes[:, 1:], codebooks.grad[:, 1:], rtol=1e-5, atol=1e-7)
    assert of_x[4].isnan().all() and of_codes[:, 0].isnan().all()


def test_a_residual_that_overflows(implementation):
    """3e38 - (-3e38) is beyond fp32: the row is lost from that level on, the level before is not."""
    x = torch.tensor([[3e38, 1.0], [1.0, 1.0]], requires_grad=True)
    codebooks = torch.tensor([[[0.0, 0.0]], [[-3e38, 0.0]]], requires_grad=True)
    out = mk.residual_quantize(x, codebooks)
    assert out.indices.tolist() == [[0, 0], [0, 0]]
    assert out.quantized[0].isnan().all() and out.quantized[1].isfinite().all()
    assert out.loss[1].isnan()
    (gradient,) = torch.autograd.grad(out.quantized.sum(), x)
    assert gradient[0].isnan().all() and gradient[1].tolist() == [1, 1]


# -- gradients --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtypes", list(itertools.product(ops.DTYPES, ops.DTYPES)), ids=lambda p: "-".join(str(d)[6:] for d in p))
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


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_same_bits_in_every_run_on_any_threads(implementation, dtype):
    """9000 rows for 5 codes: any order but the rows' own would show."""
    x, codebooks = (t.to(dtype).requires_grad_() for t in inputs(n=9_000, k=5, d=8, levels=2))

    def results(threads):
        torch.set_num_threads(threads)
        out = mk.residual_quantize(x, codebooks, statistics=True)
        return [*out, *torch.autograd.grad(out.loss.sum() + out.quantized.sum(), (x, codebooks))]

    first = results(1)
    for run in range(RUNS):
        assert_same(results(1 + run % 3), first)


def test_a_row_does_not_depend_on_its_batch(implementation):
    x, codebooks = inputs(n=300, d=16, dtype=torch.float32)
    upstream = torch.randn(300, 16)
    whole = mk.residual_quantize(x, codebooks, gradient="rotation")
    (gradient,) = torch.autograd.grad(whole.quantized, x, upstream)
    for rows in (slice(0, 1), slice(17, 50), slice(299, 300)):
        part = x.detach()[rows].requires_grad_()
        out = mk.residual_quantize(part, codebooks, gradient="rotation")
        assert torch.equal(out.quantized, whole.quantized[rows]) and torch.equal(out.indices, whole.indices[rows])
        assert torch.equal(torch.autograd.grad(out.quantized, part, upstream[rows])[0], gradient[rows])


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="the C++ part is not built")
@pytest.mark.parametrize("data", ("gaussian", "fourfold", "near_ties", "grid", "clusters", "offset", "hits"))
def test_cpp_and_reference_agree_on_hard_data(data):
    x, codes = DATA_SETS[data](150, 4 * 40, 12, torch.float32, torch.float32)
    results = []
    for implementation in ("cpp", "reference"):
        with mk.use_backend(implementation):
            results.append(mk.residual_quantize(x, codes.view(4, 40, 12), statistics=True))
    ours, theirs = results
    for name in ("quantized", "indices", "counts", "sums"):
        assert same_bits(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="the C++ part is not built")
def test_every_instruction_set_gives_the_same_bits(monkeypatch):
    probe = pytest.importorskip("mmgen_kernels._probe", reason="built with MMGEN_KERNELS_PROBE=1")
    x, codebooks = (t.requires_grad_() for t in gaussian(200, 300, 20, FP32))
    results = []
    for instruction_set in probe.instruction_sets():
        monkeypatch.setenv("MMGEN_KERNELS_CPU", instruction_set)
        assert probe.selected() == instruction_set
        with mk.use_backend("cpp"):
            out = mk.residual_quantize(x, codebooks, statistics=True)
        results.append([*out, *torch.autograd.grad(out.loss.sum() + out.quantized.sum(), (x, codebooks))])
    for other in results[1:]:
        assert_same(other, results[0])


# -- torch's machinery ------------------------------------------------------------------------------------------------


def outputs_and_gradients(function, x, codebooks):
    x, codebooks = x.detach().requires_grad_(), codebooks.detach().requires_grad_()
    out = function(x, codebooks)
    (out.loss.sum() + (out.quantized * torch.linspace(0, 1, x.shape[-1])).sum()).backward()
    return [*out[:3], x.grad, codebooks.grad]


def test_compile_with_dynamic_shapes(implementation):
    def function(x, codebooks):
        return mk.residual_quantize(x, codebooks, gradient="rotation")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows, codes, levels in ((23, 9, 3), (5, 8, 4), (64, 17, 2)):
        given = [t.float() for t in gaussian(rows, codes, 6, (torch.float32, torch.float32), levels=levels)]
        assert_same(outputs_and_gradients(compiled, *given), outputs_and_gradients(function, *given))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # sizes are not specialised on
    x, codebooks = gaussian(24, 9, 6, (torch.float32, torch.float32))
    for leading in ((2, 3, 4), (24,)):
        given = x.view(*leading, 6), codebooks
        assert_same(outputs_and_gradients(compiled, *given), outputs_and_gradients(function, *given))


def test_compile_with_levels_mask_and_sizes(implementation):
    compiled = torch.compile(mk.residual_quantize, fullgraph=True, dynamic=True, backend="aot_eager")
    x, codebooks = gaussian(24, 9, 6, (torch.float32, torch.float32), levels=3)
    x, mask, books = x.view(4, 6, 6), torch.rand(4, 6) > 0.3, [*codebooks[:2], codebooks[2, :4]]
    for options in ({"levels": 2}, {"levels": 0}, {"levels": torch.tensor([3, 1, 0, 2])}, {"mask": mask}):
        for given in (codebooks, books):
            assert_same(compiled(x, given, **options)[:3], mk.residual_quantize(x, given, **options)[:3])


def test_export(implementation):
    class Quantizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codebooks = torch.nn.ParameterList(torch.randn(k, 6) for k in (9, 4))

        def forward(self, x):
            return mk.residual_quantize(x, self.codebooks)[:3]

    module = Quantizer()
    shapes = ({0: torch.export.Dim("rows", min=2, max=4096)},)
    program = torch.export.export(module, (torch.randn(8, 6),), dynamic_shapes=shapes).module()
    for rows in (8, 3, 100):
        x = torch.randn(rows, 6)
        assert_same(program(x), module(x))


@pytest.mark.parametrize("axes", ((0, None), (None, 0), (1, 2)))
def test_vmap_and_gradients_per_sample(implementation, axes):
    shapes = ((11, 5), (3, 7, 5))
    tensors = [randn(*s, seed=1) if a is None else randn(2, *s, seed=1).movedim(0, a) for s, a in zip(shapes, axes, strict=True)]

    def loss(x, codebooks):
        out = mk.residual_quantize(x, codebooks, levels=2)
        return out.loss.sum() + (out.quantized * torch.linspace(0, 1, 5)).sum()

    def eager(i):
        x, codebooks = (t if a is None else t.select(a, i) for t, a in zip(tensors, axes, strict=True))
        x, codebooks = x.detach().requires_grad_(), codebooks.detach().requires_grad_()
        return torch.autograd.grad(loss(x, codebooks), (x, codebooks))

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=axes)(*tensors)
    for sample in range(2):
        assert_same([g[sample] for g in got], eager(sample))


def test_vmap_over_levels_and_mask(implementation):
    x, codebooks = randn(2, 3, 4, 5, seed=1), randn(3, 7, 5, seed=2)
    levels, mask = torch.tensor([[0, 1, 3], [2, 3, 9]]), randn(2, 3, 4, seed=3) > -0.5

    def function(x, levels, mask):
        return tuple(mk.residual_quantize(x, codebooks, levels=levels, mask=mask, statistics=True))

    got = vmap(function)(x, levels, mask)
    for sample in range(2):
        assert_same([g[sample] for g in got], function(x[sample], levels[sample], mask[sample]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_changes_nothing(implementation, dtype):
    x, codebooks = (t.detach() for t in inputs(dtype=torch.float32))
    expected = outputs_and_gradients(mk.residual_quantize, x, codebooks)
    with torch.autocast("cpu", dtype):
        assert_same(outputs_and_gradients(mk.residual_quantize, x, codebooks), expected)


def test_double_backward_is_refused(implementation):
    x, codebooks = inputs()
    out = mk.residual_quantize(x, codebooks, gradient="rotation")
    (gradient,) = torch.autograd.grad(out.loss.sum() + out.quantized.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_quantize_backward has no derivative"):
        gradient.sum().backward()


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


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="the C++ part is not built")
def test_sizes_that_do_not_add_up_are_refused_in_a_direct_call():
    with pytest.raises(RuntimeError, match="sizes must add up to the codes of codebooks"):
        torch.ops.mmgen_kernels.residual_quantize(
            torch.ones(2, 3), torch.ones(5, 3), [4, 4], None, None, 2, 0.25, "straight_through", "l2", "exact", False
        )


# -- bad input --------------------------------------------------------------------------------------------------------

X, C = torch.zeros(5, 4), torch.zeros(2, 3, 4)
LEVELS = torch.zeros(5, dtype=torch.int64)
BAD = {
    "x_list": ([[0.0]], C, {}, TypeError, "x must be a tensor, got list"),
    "x_int": (X.int(), C, {}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int32"),
    "x_rank_0": (torch.tensor(1.0), C, {}, ValueError, r"x must be \(..., D\) with the codebooks' D = 4, got shape \(\)"),
    "dim": (X[:, :3], C, {}, ValueError, r"x must be \(..., D\) with the codebooks' D = 4, got shape \(5, 3\)"),
    "codebooks_none": (X, None, {}, TypeError, "codebooks must be a tensor or a sequence of tensors, got NoneType"),
    "codebooks_int": (X, C.int(), {}, TypeError, "codebooks must be float64, .*got torch.int32"),
    "codebooks_rank_2": (X, C[0], {}, ValueError, r"codebooks must be \(L, K, D\) with L >= 1, .*got shape \(3, 4\)"),
    "no_levels": (X, C[:0], {}, ValueError, r"codebooks must be \(L, K, D\) with L >= 1, .*got shape \(0, 3, 4\)"),
    "no_codes": (X, C[:, :0], {}, ValueError, r"codebooks must hold 1 to 2\^31 - 1 codes, got K = 0"),
    "empty_sequence": (X, [], {}, ValueError, "codebooks must hold at least one level, got an empty sequence"),
    "sequence_of_lists": (X, [[0.0]], {}, TypeError, r"codebooks\[0\] must be a tensor, got list"),
    "sequence_rank": (X, [C[0], C], {}, ValueError, r"codebooks\[1\] must be \(K, 4\), got shape \(2, 3, 4\)"),
    "sequence_dim": (X, [C[0], C[0, :, :2]], {}, ValueError, r"codebooks\[1\] must be \(K, 4\), got shape \(3, 2\)"),
    "sequence_no_codes": (X, [C[0], C[0, :0]], {}, ValueError, r"codebooks\[1\] must hold 1 to 2\^31 - 1 codes, got K = 0"),
    "sequence_device": (X, [C[0], C[0].to(META)], {}, ValueError, r"codebooks\[1\] must be on .*device cpu, got meta"),
    "device": (X, C.to(META), {}, ValueError, "codebooks must be on x's device cpu, got meta"),
    "mask": (X, C, {"mask": torch.ones(5)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    "mask_shape": (X, C, {"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must have .*shape \(5,\), got \(4,\)"),
    "metric": (X, C, {"metric": "l1"}, ValueError, "metric must be one of l2, cosine, dot, got 'l1'"),
    "precision": (X, C, {"precision": "high"}, ValueError, "precision must be one of exact, fast, got 'high'"),
    "gradient": (X, C, {"gradient": "st"}, ValueError, "gradient must be one of straight_through, rotation, got 'st'"),
    "beta": (X, C, {"beta": torch.tensor(0.25)}, TypeError, "beta must be a number, got Tensor"),
    "statistics": (X, C, {"statistics": torch.tensor(True)}, TypeError, "statistics must be a bool, .*got Tensor"),
    "levels_negative": (X, C, {"levels": -1}, ValueError, r"levels must be in 0..2, got -1"),
    "levels_many": (X, C, {"levels": 3}, ValueError, r"levels must be in 0..2, got 3"),
    "levels_bool": (X, C, {"levels": True}, TypeError, "levels must be an int or an int64 tensor, got bool"),
    "levels_float": (X, C, {"levels": 1.0}, TypeError, "levels must be an int or an int64 tensor, got float"),
    "levels_dtype": (X, C, {"levels": LEVELS.int()}, TypeError, "levels must be an int or an int64 tensor, got torch.int32"),
    "levels_shape": (X, C, {"levels": LEVELS[:4]}, ValueError, r"levels must be \(B,\) .*got \(4,\) for x \(5, 4\)"),
    "levels_without_samples": (X[0], C, {"levels": LEVELS[:4]}, ValueError, r"levels must be \(B,\) .*got \(4,\) for x \(4,\)"),
    "levels_device": (X, C, {"levels": LEVELS.to(META)}, ValueError, "levels must be on x's device cpu, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    x, codebooks, others, error, message = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        mk.residual_quantize(x, codebooks, **others)


@pytest.mark.parametrize("beta", (0.0, -1.0, 1e30, float("inf"), float("nan")))
def test_values_never_raise(implementation, beta):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0])
    x, codebooks = bad[torch.randint(0, 5, (64, 4))].requires_grad_(), bad[torch.randint(0, 5, (3, 33, 4))].requires_grad_()
    for metric in ops.METRICS:
        out = mk.residual_quantize(x, codebooks, beta=beta, metric=metric, gradient="rotation", statistics=True)
        assert ((out.indices >= 0) & (out.indices < 33)).all()
        (out.loss.sum() + out.quantized.sum()).backward()
