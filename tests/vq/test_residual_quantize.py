"""residual_quantize beyond the battery: the formulas by hand, the definition level by level, the same bits."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.battery.vq.residual_quantize import gaussian
from mmgen_kernels.battery.vq.vector_quantize import RUNS
from mmgen_kernels.vq import ops

IMPLEMENTATIONS = battery.implementations("residual_quantize", torch.device("cpu"))
FP32 = (torch.float32, torch.float32)


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
