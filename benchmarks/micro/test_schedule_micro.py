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


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def codes(request):
    """Logits of 4096 codes, and positions of which half are masked."""
    masked = torch.arange(256).remainder(2).mul(4096).repeat(4, 1)
    return torch.randn(4, 256, 4096, dtype=request.param), masked


def test_vq_diffusion_step(benchmark, codes):
    benchmark(mk.vq_diffusion_step, *codes, mk.transition_table(torch.linspace(0.99, 0.01, 100), 4096), 50, noise=KEY)


def test_unmask_step(benchmark, codes):
    benchmark(mk.unmask_step, *codes, mk.masking_table(10), 5, mask_id=4096, noise=KEY)


def test_diffusion_loss(benchmark, latents):
    benchmark(mk.diffusion_loss, *latents, weight=torch.rand(8), kind="pseudo_huber", delta=0.1)


def test_vq_diffusion_loss(benchmark, codes):
    logits, x = codes
    table, leaf = mk.transition_table(torch.linspace(0.99, 0.01, 100), 4096), logits.clone().requires_grad_()
    benchmark(lambda: mk.vq_diffusion_loss(leaf, x.clamp(max=4095), x, table, 50).loss.backward())


def test_hybrid_loss(benchmark, latents):
    output = torch.cat(latents, 1)
    table = mk.hybrid_table(torch.linspace(1e-4, 0.02, 1000))
    benchmark(mk.hybrid_loss, output, *latents, torch.arange(8) * 125, table=table)


def test_loss_weight(benchmark):
    benchmark(mk.loss_weight, torch.arange(64), table=torch.linspace(0.99, 0.01, 100))
