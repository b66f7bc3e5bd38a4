"""residual_quantize's Triton kernels without a GPU: by the interpreter against the reference, and compiled ahead of time."""

import importlib.util

import pytest
import torch
from test_triton import MATRIX, SHARED, compiled
from triton_interpreter import Interpreter, residual_with_gradients

import mmgen_kernels as mk
from mmgen_kernels.battery.draws import rand
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.vq.residual_quantize import gaussian
from mmgen_kernels.vq import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NAMES = ("quantized", "indices", "loss", "grad_x", "grad_codebooks", "counts", "sums")
FP32 = (torch.float32, torch.float32)


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


def one_nan(values):
    """Every NaN as the same bits: the sign of inf - inf is the processor's."""
    return torch.where(values.isnan(), torch.nan, values) if values.is_floating_point() else values


def assert_same(interpreter, x, codebooks, any_nan=False, **options):
    """To the bit, but for the loss, which the reference adds in another order; with any_nan but for the bits of NaN. Gradients have
    tests of their own, test_residual_backward_triton.py."""
    found = interpreter.residual_quantize(x, codebooks, **options)
    expected = residual_with_gradients("reference", x.clone(), codebooks.clone(), **options)
    for name, a, b in zip(NAMES[: len(expected)], found, expected, strict=True):
        if name.startswith("grad"):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, equal_nan=True)
            continue
        if name == "loss":
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-13 if a.dtype == torch.float64 else 3e-7, atol=0, equal_nan=True)
        else:
            assert same_bits(one_nan(a), one_nan(b)) if any_nan else same_bits(a, b), name


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
def test_more_rows_than_a_block(interpreter, gradient):
    assert_same(interpreter, *gaussian(35, 9, 5, FP32, levels=3), gradient=gradient)


def test_more_blocks_than_are_added_at_a_time(interpreter):
    mask = torch.arange(530) % 50 == 29
    assert_same(interpreter, *gaussian(530, 2, 2, FP32, levels=1), mask=mask)


@pytest.mark.parametrize("metric", ("cosine", "dot"))
def test_metrics(interpreter, metric):
    assert_same(interpreter, *gaussian(4, 9, 5, FP32, levels=2), metric=metric)


DTYPES = (
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_dtypes(interpreter, dtypes):
    assert_same(interpreter, *gaussian(5, 9, 5, dtypes, levels=2))


@pytest.mark.parametrize("dim", (1, 70))
def test_dims_of_one_and_of_several_tiles(interpreter, dim):
    assert_same(interpreter, *gaussian(3, 9, dim, FP32, levels=2))


def test_levels_and_mask(interpreter):
    x, codebooks = gaussian(12, 9, 5, FP32, levels=3)
    x, mask = x.view(4, 3, 5), rand(4, 3, seed=3) < 0.7
    assert_same(interpreter, x, codebooks, levels=torch.tensor([2, 9, -1, 1]), mask=mask)
    assert_same(interpreter, x, codebooks, levels=2)
    assert_same(interpreter, x, codebooks, levels=0)
    assert_same(interpreter, torch.where(mask[..., None], x, torch.nan), codebooks, mask=mask)


def test_sizes_and_a_shared_codebook(interpreter):
    x, codebooks = gaussian(5, 6, 5, FP32, levels=3)
    assert_same(interpreter, x, codebooks.flatten(0, 1), sizes=[3, 1, 14])
    assert_same(interpreter, x, codebooks[0], shared=3)


def test_strides_of_everything(interpreter):
    x, codebooks = gaussian(6, 9, 10, FP32, levels=2)
    x = x.view(2, 3, 10).transpose(0, 1)[..., ::2]
    assert_same(interpreter, x, codebooks.transpose(1, 2).contiguous().transpose(1, 2)[..., 1::2])


def test_no_rows_and_one(interpreter):
    x, codebooks = gaussian(4, 9, 5, FP32, levels=2)
    assert_same(interpreter, x[:0], codebooks)
    assert_same(interpreter, x[0], codebooks)


def test_level_by_level(interpreter):
    """Levels of different sizes, which one launch does not serve: rows that are not finite, or take part in some levels only."""
    x, codebooks = gaussian(12, 9, 5, FP32, levels=3)
    codebooks, sizes = codebooks.flatten(0, 1), [10, 9, 8]
    x[1, 2], x[5, 0], x[9, 1] = torch.nan, torch.inf, -torch.inf
    x, mask = x.view(4, 3, 5), rand(4, 3, seed=3) < 0.7
    assert_same(interpreter, x, codebooks, sizes=sizes, levels=torch.tensor([2, 9, -1, 1]), mask=mask, any_nan=True)
    assert_same(interpreter, x, codebooks, sizes=sizes, levels=2, metric="dot", any_nan=True)


def test_level_by_level_with_a_residual_that_overflows_and_with_the_sign_of_zero(interpreter):
    codebooks = torch.tensor([[0.0, 0.0], [-3e38, 0.0], [-3e38, 1.0]])
    assert_same(interpreter, torch.tensor([[3e38, 1.0], [1.0, 1.0]]), codebooks, sizes=[1, 2])
    codebooks = torch.tensor([[-0.0, 1e-45], [-0.0, 0.0], [5.0, 5.0]])
    found = interpreter.residual_quantize(torch.zeros(1, 2), codebooks, sizes=[1, 2])[0]
    assert same_bits(found, codebooks[:1])


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_rows_that_are_not_finite(interpreter, value):
    x, codebooks = gaussian(4, 9, 5, FP32, levels=2)
    x[1, 2] = value
    assert_same(interpreter, x, codebooks, gradient="rotation")


def test_a_residual_that_overflows(interpreter):
    x = torch.tensor([[3e38, 1.0], [1.0, 1.0]])
    assert_same(interpreter, x, torch.tensor([[[0.0, 0.0]], [[-3e38, 0.0]]]))


def test_the_sign_of_zero(interpreter):
    codebooks = torch.tensor([[[-0.0, 1e-45]], [[-0.0, 0.0]]])
    found = interpreter.residual_quantize(torch.zeros(1, 2), codebooks)[0]
    assert same_bits(found, codebooks[0])


def test_statistics_of_more_levels_than_a_group(interpreter):
    """Rows that stop being finite in the first group of eight levels and in the second, and rows that stop taking part."""
    x, codebooks = gaussian(9, 4, 5, FP32, levels=11)
    x[1, 2] = torch.nan
    codebooks[9] = torch.nan
    levels = torch.tensor([11, 11, 3, 0, 8, 9, 11, 11, 1])
    assert_same(interpreter, x, codebooks, levels=levels, any_nan=True)
    assert_same(interpreter, x[2:], codebooks.flatten(0, 1), sizes=[1, 7, 4, 4, 4, 4, 4, 4, 4, 5, 3], any_nan=True)


def test_statistics_of_a_popular_code(interpreter):
    """One code's rows fill several chunks of sorted rows."""
    assert_same(interpreter, *gaussian(90, 1, 3, FP32, levels=2), statistics=torch.float64)


@pytest.mark.parametrize("statistics", (None, torch.float64))
def test_opcheck(interpreter, statistics):
    x, codebooks = gaussian(4, 5, 4, FP32, levels=2)
    rest = (None, 2, 0.25, "straight_through", "l2", "exact", statistics)
    interpreter.opcheck(x.view(2, 2, 4), codebooks, [], torch.tensor([1, 2]), *rest, operator="residual_quantize")
    interpreter.opcheck(x, codebooks.flatten(0, 1), [3, 7], None, *rest, operator="residual_quantize")


# -- all levels in one launch, and no statistics after it --------------------------------------------------------------


def assert_same_in_one_launch(interpreter, x, codebooks, **options):
    assert_same(interpreter, x, codebooks, statistics=False, **options)


def test_what_one_launch_serves():
    from mmgen_kernels.vq.triton_kernels.residual import in_one_launch  # Triton may be missing

    fp32 = torch.float32
    assert in_one_launch(128, 1024, 32, [], fp32) and in_one_launch(8, 1024, 9, [1024] * 9, fp32)
    refused = (
        (128, 1024, 32, [], torch.float64),
        (256, 1024, 4, [], fp32),
        (72, 64, 4, [], fp32),
        (128, 8192, 4, [], fp32),
        (8, 32768, 4, [], fp32),
        (8, 5, 3, [5, 6, 5], fp32),
        (8, 5, 65_536, [], fp32),
    )
    assert not any(in_one_launch(*case) for case in refused)


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("name", ("near_ties", "fourfold", "grid", "mixed_codes"))
def test_one_launch(interpreter, name, metric):
    assert_same_in_one_launch(interpreter, *gaussian(3, 69, 3, FP32, name, levels=2), metric=metric)


def test_one_launch_of_more_rows_than_a_block(interpreter):
    assert_same_in_one_launch(interpreter, *gaussian(67, 69, 5, FP32, levels=2))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_one_launch_in_other_dtypes(interpreter, dtypes):
    assert_same_in_one_launch(interpreter, *gaussian(5, 70, 8, dtypes, levels=2))


@pytest.mark.parametrize("sizes", ((3, 130, 16), (3, 70, 48), (1, 1, 1), (65, 2, 3)), ids=str)
def test_one_launch_of_other_sizes(interpreter, sizes):
    assert_same_in_one_launch(interpreter, *gaussian(*sizes, FP32, levels=3))


def test_one_launch_with_equal_codes(interpreter):
    """Two rows apart, more codes than are evaluated beside one another, and two in the same place of different tiles."""
    x, codebooks = gaussian(5, 150, 4, FP32, levels=2)
    codebooks[0, 9] = codebooks[0, 3] = x[0]
    codebooks[0, 20:40] = x[1]
    codebooks[0, 65] = codebooks[0, 129] = x[2]
    assert_same_in_one_launch(interpreter, x, codebooks)
    found = interpreter.residual_quantize(x, codebooks, statistics=False)[1]
    assert found[:3, 0].tolist() == [3, 20, 65]


def test_one_launch_with_a_level_of_zeros(interpreter):
    x, codebooks = gaussian(3, 70, 4, FP32, levels=3)
    codebooks[1] = 0
    assert_same_in_one_launch(interpreter, x, codebooks)


@pytest.mark.parametrize("metric", ops.METRICS)
def test_one_launch_with_what_is_not_finite(interpreter, metric):
    x, codebooks = gaussian(6, 70, 4, FP32, levels=3)
    x[1, 2], x[2, 0], x[3, 1] = torch.nan, torch.inf, -torch.inf
    codebooks[1, 5, 0], codebooks[2, 66, 1] = torch.nan, torch.inf
    assert_same_in_one_launch(interpreter, x, codebooks, metric=metric, any_nan=True)
    codebooks[1] = torch.inf
    assert_same_in_one_launch(interpreter, x, codebooks, metric=metric, any_nan=True)


@pytest.mark.parametrize("exponents", ((-100, 20), (100, -20), (-60, -60), (120, 0)), ids=str)
def test_one_launch_of_rows_and_codes_far_apart(interpreter, exponents):
    x, codebooks = gaussian(4, 70, 4, FP32, levels=2)
    assert_same_in_one_launch(interpreter, x * 2.0 ** exponents[0], codebooks * 2.0 ** exponents[1])


def test_one_launch_with_levels_mask_and_strides(interpreter):
    x, codebooks = gaussian(72, 9, 5, FP32, levels=3)
    x, mask = x.view(4, 18, 5), rand(4, 18, seed=3) < 0.7
    assert_same_in_one_launch(interpreter, x, codebooks, levels=torch.tensor([2, 9, -1, 1]), mask=mask)
    assert_same_in_one_launch(interpreter, x, codebooks, levels=0)
    assert_same_in_one_launch(interpreter, x, codebooks, levels=2)
    assert_same_in_one_launch(interpreter, torch.where(mask[..., None], x, torch.nan), codebooks, mask=mask)
    strided = x.view(2, 36, 5).transpose(0, 1)[..., 1:]
    assert_same_in_one_launch(interpreter, strided, codebooks.transpose(1, 2).contiguous().transpose(1, 2)[..., 1:])


def test_one_launch_of_a_shared_codebook_and_of_equal_sizes(interpreter):
    x, codebooks = gaussian(5, 6, 5, FP32, levels=3)
    assert_same_in_one_launch(interpreter, x, codebooks[0], shared=3)
    assert_same_in_one_launch(interpreter, x, codebooks.flatten(0, 1), sizes=[6, 6, 6])


def test_the_device_rule():
    with mk.use_backend("triton"), pytest.raises(RuntimeError, match="runs on cuda tensors, not on cpu"):
        mk.residual_quantize(torch.ones(2, 3), torch.ones(2, 4, 3))


# -- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gradient", ops.GRADIENTS)
@pytest.mark.parametrize("sizes", ((1000, 1024, 128), (2376, 1024, 8), (65, 300, 70)), ids=str)
def test_the_definition_on_gpu(sizes, gradient):
    """Losses and gradients are added in another order than on the CPU."""
    x, codebooks = gaussian(*sizes, FP32, levels=5)
    levels = torch.arange(len(x)) % 7
    found = residual_with_gradients("triton", x.cuda(), codebooks.cuda(), gradient=gradient, levels=levels.cuda())
    expected = residual_with_gradients("cpp", x, codebooks, gradient=gradient, levels=levels)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        if name in ("quantized", "indices", "counts"):
            assert same_bits(a.cpu(), b), name
        else:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.gpu
@needs_gpu
def test_the_same_in_every_run_and_in_a_graph():
    """A race would show as a difference, a look at a value on the host as an error of the capture."""
    x, codebooks = (t.cuda() for t in gaussian(4800, 256, 64, FP32))
    levels = torch.arange(4800, device="cuda") % 5

    def step():
        rows, books = x.detach().requires_grad_(), codebooks.detach().requires_grad_()
        out = mk.residual_quantize(rows, books, levels=levels, statistics=True, gradient="rotation")
        return [*out, *torch.autograd.grad(out.loss.sum() + out.quantized.square().sum(), (rows, books))]

    with mk.use_backend("triton"):
        first = step()
        for _ in range(20):
            assert all(same_bits(a.detach(), b.detach()) for a, b in zip(step(), first, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    graph.replay()
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(captured, first, strict=True))


# -- ahead of time ----------------------------------------------------------------------------------------------------


def assert_good_code(requests):
    for request, code in compiled(requests).items():
        where = f"{request}: {code}"
        assert code["stack"] == 0 and code["spills"] == 0, where
        assert code["shared"] <= SHARED[request[1]], where
        assert code["fused"] == 0 and not code["block_pointers"], where
        if request[0] == "residual_levels":
            assert MATRIX[request[1]] in code["instructions"], where


def test_compiles_without_spills():
    others = [["advance", 90, 128, ""], ["mean_squares", 90, 128, ""], ["summarise_levels", 90, 128, ""]]
    assert_good_code([*others, *(["residual_levels", capability, 128, "l2"] for capability in SHARED)])


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_compiles_without_spills(capability):
    advance = [["advance", capability, dim, which] for dim in (8, 32, 128) for which in ("", "first")]
    assert_good_code([*advance, *(["residual_levels", capability, dim, m] for dim in (8, 64, 128) for m in ops.METRICS)])
