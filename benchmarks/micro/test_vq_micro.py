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


def test_gather_codes(benchmark, data):
    x, codebook = data
    indices = mk.nearest_code(x, codebook)
    benchmark(mk.gather_codes, codebook, indices)


def test_code_statistics(benchmark, data):
    x, codebook = data
    indices = mk.nearest_code(x, codebook)
    benchmark(mk.code_statistics, x, indices, len(codebook))


def test_update_codebook_ema(benchmark, data):
    x, codebook = data
    counts, sums = mk.code_statistics(x, mk.nearest_code(x, codebook), len(codebook))
    benchmark(mk.update_codebook_ema_, codebook.clone(), torch.ones(len(codebook)), codebook.clone(), counts, sums)


def test_replace_dead_codes(benchmark, data):
    """Half of the codes, each time."""
    x, codebook = data
    size = (torch.arange(len(codebook)) % 2).float()
    key, total = torch.tensor([1, 2]), codebook.clone()
    benchmark(mk.replace_dead_codes_, codebook.clone(), size, total, x, key, threshold=0.5, reset_cluster_size=0.0)


def test_kmeans(benchmark, data):
    x, codebook = data
    benchmark(mk.kmeans, x, len(codebook), torch.tensor([1, 2]), iterations=2)


def test_residual_quantize_step(benchmark, data):
    x, codebook = data
    codebooks = torch.stack([codebook * 0.9**level for level in range(4)]).requires_grad_()
    x = x.requires_grad_()

    def step():
        out = mk.residual_quantize(x, codebooks)
        return torch.autograd.grad(out.quantized.sum() + out.loss.sum(), (x, codebooks))

    benchmark(step)


def test_code_entropy_step(benchmark, data):
    x, codebook = (tensor.requires_grad_() for tensor in data)

    def step():
        out = mk.code_entropy(x, codebook, temperature=10.0, eps=1e-5)
        return torch.autograd.grad(out.sample_entropy.mean() - out.mean_entropy, (x, codebook))

    benchmark(step)
