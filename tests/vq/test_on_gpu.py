"""What only a GPU can tell: races, miscompiled code, how matrix units add, what a graph captures."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.battery.draws import rand, randn
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.vq import ops, reference

pytestmark = pytest.mark.gpu
KERNELS = [name for name in ("cuda", "triton") if not backends.reasons_against(OPERATORS["nearest_code"], name, "cuda")]
SIZES = ((1000, 3000, 3), (4096, 16384, 8), (300, 5000, 19), (257, 1025, 64), (640, 4097, 256))


def on_gpu(implementation, x, codebook, metric="l2", mask=None):
    with mk.use_backend(implementation):
        return mk.nearest_code(x.cuda(), codebook.cuda(), metric=metric, mask=None if mask is None else mask.cuda()).cpu()


def truth(x, codebook, metric="l2", mask=None):
    """The C++ path, which the tests compare with the definition; the definition where it was not built."""
    implementation = "cpp" if OPERATORS["nearest_code"].has_cpp else "reference"
    with mk.use_backend(implementation):
        return mk.nearest_code(x, codebook, metric=metric, mask=mask)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_definition(sizes, data, metric, implementation):
    x, codebook = DATA_SETS[data](*sizes, torch.float32, torch.float32)
    assert torch.equal(on_gpu(implementation, x, codebook, metric), truth(x, codebook, metric))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_heads_and_mask(dtype, implementation):
    x, codebook, mask = randn(3, 500, 12, seed=1).to(dtype), randn(3, 700, 12, seed=2).to(dtype), rand(3, 500, seed=3) < 0.7
    assert torch.equal(on_gpu(implementation, x, codebook, mask=mask), truth(x, codebook, mask=mask))


@pytest.mark.parametrize("implementation", KERNELS)
def test_the_same_in_every_run_and_in_a_graph(implementation):
    """A race would show as a difference, a look at a value on the host as an error of the capture."""
    x, codebook = (t.cuda() for t in DATA_SETS["near_ties"](4096, 4096, 8, torch.float32, torch.float32))
    with mk.use_backend(implementation):
        first = mk.nearest_code(x, codebook)
        assert all(torch.equal(mk.nearest_code(x, codebook), first) for _ in range(20))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = mk.nearest_code(x, codebook)
    x.copy_(x.roll(1, 0))
    graph.replay()
    assert torch.equal(captured, first.roll(1, 0))


@pytest.mark.parametrize("implementation", KERNELS)
def test_another_device_current(implementation):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, codebook = randn(100, 8, seed=1).float(), randn(200, 8, seed=2).float()
    with torch.cuda.device(0), mk.use_backend(implementation):
        found = mk.nearest_code(x.to("cuda:1"), codebook.to("cuda:1"))
    assert torch.equal(found.cpu(), truth(x, codebook))


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
@pytest.mark.parametrize("implementation", KERNELS)
def test_vector_quantize(implementation, gradient):
    x, codebook = DATA_SETS["clusters"](500, 700, 8, torch.float32, torch.float32)
    with mk.use_backend(implementation):
        found = mk.vector_quantize(x.cuda(), codebook.cuda(), gradient=gradient)
    expected = reference.vector_quantize(x, codebook, None, 0.25, False, gradient, "l2", "exact")
    assert torch.equal(found.indices.cpu(), expected[1]) and torch.equal(found.quantized.cpu(), expected[0])
    assert torch.allclose(found.loss.cpu(), expected[2], rtol=1e-5)


def test_how_matrix_units_add():
    """The assumption of the bound: an instruction loses at most 2^-23 of its largest addend for each of its addends, and of its
    result. Sums in which a large product meets many that fall just below its last digit, all of one sign, at every place."""
    pytest.importorskip("triton")
    from matrix_product import matrix_product

    for dim in (16, 64, 256):
        rows = torch.full((64, dim), 2.0**-12)
        rows[torch.arange(64), torch.arange(64) % dim] = 1.0
        for small in (2.0**-12, 1.9990234375 * 2.0**-13, 1.5 * 2.0**-12):
            columns = torch.full((64, dim), small)
            columns[torch.arange(64), torch.arange(64) % dim] = 1.9990234375
            a, b = rows.half().cuda(), columns.half().cuda()
            out = torch.empty(64, 64, device="cuda")
            matrix_product[(1,)](a, b, out, D=dim)
            exact = a.double() @ b.double().T
            magnitudes = a.double().abs() @ b.double().abs().T
            assert ((out.double() - exact).abs() <= 1.5 * dim * 2.0**-23 * magnitudes).all()
