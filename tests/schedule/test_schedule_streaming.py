"""Results past the caches: where a call's tensors are more than the last cache holds, the same bits from other stores."""

from pathlib import Path

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.library import OPERATORS

FP32, BF16 = torch.float32, torch.bfloat16
TABLE = torch.tensor([[[1.4, -0.9, 0, 0], [0.35, 0.2, 0.6, 0], [0, 0, 1, 0]]], dtype=torch.float64)
SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
CACHE = int(SIZE.read_text().strip().rstrip("K")) * 1024 if SIZE.exists() else 2**25  # as csrc/schedule/pass.h has it


@pytest.mark.skipif(not OPERATORS["scheduler_step"].has_cpp, reason="the C++ part is not built")
@pytest.mark.skipif(CACHE > 2**28, reason="would need gigabytes")
@pytest.mark.parametrize("instruction_set", ("", "scalar", "avx2", "avx512"))
@pytest.mark.parametrize(("dtype", "wide"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize("odd", (0, 1, 17))  # samples that begin where no streaming store can, and ends that fill no vector
def test_a_large_step_has_the_bits_of_its_samples_alone(instruction_set, dtype, wide, odd, monkeypatch):
    if instruction_set:
        monkeypatch.setenv("MMGEN_KERNELS_CPU", instruction_set)
    size = CACHE // (2 * dtype.itemsize + dtype.itemsize + wide.itemsize) // 4 + odd  # of one sample of five
    x, m = (torch.randn(5, size, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    index = torch.zeros(5, dtype=torch.int64)  # each sample has its own row
    try:
        expected = [mk.scheduler_step((x[i], m[i]), TABLE, 0, dtypes=(dtype, wide)) for i in range(5)]
    except RuntimeError as error:
        pytest.skip(str(error))
    for step in (0, index):
        found = mk.scheduler_step((x, m), TABLE, step, dtypes=(dtype, wide))
        for i in range(5):
            assert all(same_bits(a[i], b) for a, b in zip(found, expected[i], strict=True))
