"""One pytest-benchmark per public op of the philox family: `make bench-micro`."""

import pytest
import torch

mk = pytest.importorskip("mmgen_kernels")

SHAPES = {"4x4x32x32": (4, 4, 32, 32), "16x16x64x64": (16, 16, 64, 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


@pytest.fixture
def keys(shape):
    return mk.fold_in(torch.tensor([2026, 0]), torch.arange(shape[0]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_philox_normal(benchmark, shape, keys, dtype):
    benchmark(mk.philox_normal, shape, keys, dtype=dtype)


def test_torch_randn(benchmark, shape):
    """What it stands in for, from a generator whose state is no key."""
    benchmark(torch.randn, shape)


def test_philox_uniform(benchmark, shape, keys):
    benchmark(mk.philox_uniform, shape, keys)


def test_philox_integers(benchmark, shape, keys):
    benchmark(mk.philox_integers, shape, keys)


def test_fold_in(benchmark, keys):
    benchmark(mk.fold_in, keys, 3)
