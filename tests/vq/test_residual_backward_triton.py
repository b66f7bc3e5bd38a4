"""residual_quantize's backward by Triton without a GPU: by the interpreter against fp64, and compiled ahead of time."""

import importlib.util

import pytest
import torch
from test_triton import SHARED, compiled
from triton_interpreter import Interpreter

from mmgen_kernels.battery import tolerance
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.vq import ops, reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
FP32 = (torch.float32, torch.float32)


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


def inputs(N, K, D, levels, dtypes=FP32):
    """x (N, D), codebooks (L, K, D), indices (N, L), where every fourth row takes part in fewer levels, and one in none."""
    x, codebooks = randn(N, D, seed=1).to(dtypes[0]), randn(levels, K, D, seed=2).to(dtypes[1])
    indices = randint(0, K, (N, levels), 3)
    taken = torch.where(torch.arange(N) % 4 == 1, randint(0, levels + 1, (N,), 4), levels)
    taken[2:3] = 0
    return x, codebooks, torch.where(torch.arange(levels) < taken[:, None], indices, -1)


def assert_gradients(
    interpreter, x, codebooks, indices, *, sizes=(), gradient="straight_through", of=("quantized", "loss"), needs=(True, True)
):
    """Within the law of battery/tolerance.py, against the reference in fp64, and the same bits twice."""
    dtype = torch.promote_types(x.dtype, codebooks.dtype)
    levels = indices.shape[-1]
    of_quantized = randn(*x.shape, seed=5).to(dtype) if "quantized" in of else None
    of_loss = randn(levels, seed=6).to(torch.promote_types(dtype, torch.float32)) if "loss" in of else None
    rest = (indices, list(sizes), 0.3, gradient, *needs)
    found = interpreter.call("residual_quantize_backward", of_quantized, of_loss, x, codebooks, *rest)
    plain = reference.residual_quantize_backward(of_quantized, of_loss, x, codebooks, *rest)
    wide = (None if t is None else t.double() for t in (of_quantized, of_loss, x, codebooks))
    truth = reference.residual_quantize_backward(*wide, *rest)
    for name, *results in zip(("grad_x", "grad_codebooks"), found, plain, truth, strict=True):
        assert results[0].is_contiguous()
        failure = tolerance.failure(name, *results)[1]
        assert failure is None, failure
    return found


def by_turns(values, name=str):
    """Each value with one way of the gradient, and in the long tests with the other: a run in the interpreter takes a second."""
    for i, value in enumerate(values):
        for j, gradient in enumerate(ops.GRADIENTS):
            marks = pytest.mark.long if (i + j) % 2 else ()
            yield pytest.param(value, gradient, marks=marks, id=f"{name(value)}-{gradient}")


SIZES = ((37, 5, 6, 3), (3, 4, 70, 2), (1, 1, 1, 1), (3, 3, 2, 11), (0, 3, 4, 2))


@pytest.mark.parametrize(("sizes", "gradient"), list(by_turns(SIZES)))
def test_sizes(interpreter, sizes, gradient):
    """More rows than a block and a chunk hold; one of everything; several tiles of components; two groups of levels; no rows."""
    assert_gradients(interpreter, *inputs(*sizes), gradient=gradient)


DTYPES = (
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
)


@pytest.mark.parametrize(("dtypes", "gradient"), list(by_turns(DTYPES, lambda pair: "-".join(str(d)[6:] for d in pair))))
def test_dtypes(interpreter, dtypes, gradient):
    assert_gradients(interpreter, *inputs(7, 3, 5, 2, dtypes), gradient=gradient)


@pytest.mark.parametrize(("of", "gradient"), list(by_turns((("quantized",), ("loss",), ()))))
def test_gradients_that_are_not_there(interpreter, of, gradient):
    assert_gradients(interpreter, *inputs(9, 3, 5, 2), gradient=gradient, of=of)


@pytest.mark.parametrize("needs", ((True, False), (False, True)), ids=str)
def test_gradients_that_nobody_needs(interpreter, needs):
    both = assert_gradients(interpreter, *inputs(6, 3, 5, 2))
    found = assert_gradients(interpreter, *inputs(6, 3, 5, 2), needs=needs)
    for needed, result, expected in zip(needs, found, both, strict=True):
        assert torch.equal(result, expected) if needed else result.shape == (0,)


def test_codebooks_of_different_sizes(interpreter):
    x, codebooks, indices = inputs(6, 4, 3, 10)
    sizes = [1, 9, 4, 4, 4, 4, 4, 2, 6, 2]
    assert_gradients(interpreter, x, codebooks.flatten(0, 1), indices.remainder(torch.tensor(sizes)), sizes=sizes)
    assert_gradients(interpreter, x, codebooks.flatten(0, 1), indices, sizes=[4] * 10)


def test_a_shared_codebook(interpreter):
    x, codebooks, indices = inputs(6, 4, 5, 3)
    assert_gradients(interpreter, x, codebooks[0].expand(3, 4, 5), indices)


def test_an_index_past_the_end_is_the_last_code(interpreter):
    x, codebooks, indices = inputs(6, 4, 5, 3)
    found = assert_gradients(interpreter, x, codebooks, torch.where(indices == 3, 9, indices))
    assert all(torch.equal(a, b) for a, b in zip(found, assert_gradients(interpreter, x, codebooks, indices), strict=True))


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
def test_strides_of_everything(interpreter, gradient):
    x, codebooks, indices = inputs(12, 4, 10, 3)
    x = x.view(3, 4, 10).transpose(0, 1)[..., ::2]  # (4, 3, 5)
    codebooks = codebooks.transpose(0, 2).contiguous().transpose(0, 2)[..., 1::2]
    indices = indices.view(3, 4, 3).transpose(0, 1)
    assert_gradients(interpreter, x, codebooks, indices, gradient=gradient)


def test_a_popular_code(interpreter):
    """The rows of one code fill several chunks, and end where no chunk does."""
    x, codebooks, indices = inputs(110, 3, 2, 2)
    assert_gradients(interpreter, x, codebooks, indices.where(torch.arange(110)[:, None] % 9 == 0, 1))


@pytest.mark.parametrize(("value", "gradient"), list(by_turns((torch.nan, torch.inf))))
def test_rows_that_are_not_finite(interpreter, value, gradient):
    """In the first group of levels and in the second: NaN reaches the row and its codes, from that level on, and nothing else."""
    x, codebooks, indices = inputs(9, 5, 3, 11)
    x[0, 1] = value
    codebooks[9, 4] = value
    indices[:, 9] = indices[:, 9].clamp(max=3)
    indices[0], indices[5], indices[5, 9] = 0, 1, 4
    grad_x, grad_codebooks = assert_gradients(interpreter, x, codebooks, indices, gradient=gradient)
    assert grad_x.isnan().all(1).nonzero().flatten().tolist() == [0, 5]
    assert grad_codebooks.isnan().all(2).sum(1).tolist() == [1] * 9 + [2, 2]
    grad_x, grad_codebooks = assert_gradients(interpreter, x, codebooks, indices, gradient=gradient, of=("quantized",))
    assert grad_x.isnan().all(1).nonzero().flatten().tolist() == [0, 5] and grad_codebooks.isnan().any()


def test_a_residual_that_overflows(interpreter):
    """In fp32, where fp64 would have gone on."""
    x, codebooks = torch.tensor([[3e38, 1.0], [1.0, 1.0]]), torch.tensor([[[0.0, 0.0]], [[-3e38, 0.0]], [[3e38, 0.0]]])
    upstream, of_loss = torch.ones(2, 2), torch.ones(3)
    rest = (torch.zeros(2, 3, dtype=torch.int64), [], 0.25, "straight_through", True, True)
    found = interpreter.call("residual_quantize_backward", upstream, of_loss, x, codebooks, *rest)
    expected = reference.residual_quantize_backward(upstream, of_loss, x, codebooks, *rest)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and b.isnan().any() and not b.isnan().all()


def test_rows_without_a_rotation(interpreter):
    """Where x, the sum of the codes or the sum of the two unit vectors is zero, the gradient passes straight through."""
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, -2.0], [3.0, 1.0]])
    codebooks = torch.tensor([[[0.0, 0.0], [-1.0, 2.0], [1.0, 1.0]]])
    indices = torch.tensor([[2], [0], [1], [2]])
    grad_x, _ = assert_gradients(interpreter, x, codebooks, indices, gradient="rotation", of=("quantized",))
    upstream = randn(4, 2, seed=5).float()
    assert torch.equal(grad_x[:3], upstream[:3]) and not torch.equal(grad_x[3], upstream[3])


# -- ahead of time ----------------------------------------------------------------------------------------------------

VARIANTS = {
    "walk_levels": ("", "wide"),
    "sum_level_runs": ("", "gradient", "wide gradient"),
    "pull_back": ("", "rotation", "wide rotation"),
    "add_rotated": ("", "wide"),
}


def assert_good_code(requests):
    for request, code in compiled(requests).items():
        where = f"{request}: {code}"
        assert code["stack"] == 0 and code["spills"] == 0, where
        assert code["shared"] <= SHARED[request[1]], where
        assert code["fused"] == 0 and not code["block_pointers"], where


def test_compiles_without_spills():
    assert_good_code([[kernel, 90, 128, variants[-1]] for kernel, variants in VARIANTS.items()])


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_compiles_without_spills(capability):
    assert_good_code([[k, capability, dim, which] for k, vs in VARIANTS.items() for which in vs for dim in (8, 32, 128)])
