"""One pytest-benchmark per public op of the vq family: `make bench-micro`.

For watching our own times from commit to commit. Comparisons with others belong in the races (`make bench FAMILY=vq`).
"""

import pytest
import torch

mk = pytest.importorskip("mmgen_kernels")

SHAPES = {"4096x4096x8": (4096, 4096, 8), "4096x1024x64": (4096, 1024, 64), "4800x1024x128": (4800, 1024, 128)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def data(request):
    rows, num_codes, width = request.param
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randn(num_codes, width, generator=generator)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_nearest_code(benchmark, data, precision):
    x, codebook = data
    benchmark(mk.nearest_code, x, codebook, precision=precision)


def test_vector_quantize_forward(benchmark, data):
    x, codebook = data
    benchmark(mk.vector_quantize, x, codebook)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_vector_quantize_step(benchmark, data, gradient):
    x, codebook = (tensor.requires_grad_() for tensor in data)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def step():
        out = mk.vector_quantize(x, codebook, gradient=gradient)
        return torch.autograd.grad((out.quantized, out.loss), (x, codebook), (upstream, torch.ones_like(out.loss)))

    benchmark(step)
