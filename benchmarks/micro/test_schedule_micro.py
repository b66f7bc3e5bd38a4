"""One pytest-benchmark per public op of the schedule family: `make bench-micro`."""

import pytest
import torch

mk = pytest.importorskip("mmgen_kernels")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TABLE = torch.randn(20, 3, 4, dtype=torch.float64)
KEY = torch.tensor([1, 2])


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def latents(request):
    return [torch.randn(8, 16, 64, 64, dtype=request.param) for _ in range(2)]


def test_scheduler_step(benchmark, latents):
    benchmark(mk.scheduler_step, latents, TABLE, 3)


def test_scheduler_step_with_noise(benchmark, latents):
    benchmark(mk.scheduler_step, latents, TABLE, 3, noise=KEY)


def test_guidance(benchmark, latents):
    benchmark(mk.guidance, *latents, 7.5)


def test_add_noise(benchmark, latents):
    benchmark(mk.add_noise, latents[0], KEY, torch.rand(8), path="linear", target="flow")
