"""One pytest-benchmark per public op of the modulation family: `make bench-micro`."""

import pytest
import torch

mk = pytest.importorskip("mmgen_kernels")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def inputs(request):
    """x, y and three of six vectors as one Linear gives them: DiT-S/2 with 4 samples."""
    x, y, vectors = (torch.randn(shape, dtype=request.param) for shape in ((4, 256, 384), (4, 256, 384), (4, 6 * 384)))
    return x, y, *vectors.chunk(6, dim=1)[:3]


def test_adaln(benchmark, inputs):
    x, _, _, shift, scale = inputs
    benchmark(mk.adaln, x, shift, scale)


def test_gate_residual(benchmark, inputs):
    x, y, gate, _, _ = inputs
    benchmark(mk.gate_residual, x, y, gate)


def test_gate_residual_adaln(benchmark, inputs):
    benchmark(mk.gate_residual_adaln, *inputs)
