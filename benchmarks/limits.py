"""What the machine can do at best, measured beside the times that are compared with it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping

import torch

PROBE_SECONDS = 0.15


def _best(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of the calls that fit in `PROBE_SECONDS` (three at least): a limit is a maximum, not a median."""
    call()
    best, deadline, count = float("inf"), time.perf_counter() + PROBE_SECONDS, 0
    while count < 3 or time.perf_counter() < deadline:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def _matmul_gflops(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    best = 0.0
    for size in sizes:
        a = torch.ones(size, size, dtype=dtype, device=device)
        out = torch.empty_like(a)
        best = max(best, 2 * size**3 / _best(lambda a=a, out=out: torch.mm(a, a, out=out), device) / 1e9)
    return best


def _fma(device: torch.device, threads: int) -> tuple[float, str]:
    """Single-precision multiply-add peak in GFLOP/s, and where the figure comes from."""
    if device.type == "cpu":
        try:
            probe = importlib.import_module("mmgen_kernels._probe")
            return float(probe.fma_peak(PROBE_SECONDS, threads)), "FMA loop"
        except (ImportError, AttributeError):
            pass
    sizes = (768, 1536, 2560) if device.type == "cpu" else (4096, 8192)
    return _matmul_gflops(device, torch.float32, sizes), "best of several torch.mm"


def _copy_gb_s(device: torch.device) -> float:
    """Bytes read and written per second by one copy of a buffer far larger than any cache."""
    elements = 2**26 if device.type == "cpu" else 2**28
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e9


def measure(device: torch.device, threads: int) -> dict[str, float | str]:
    """`fma_gflops` with its source, `bf16_gflops` (matrix units, where there are any) and `copy_gb_s`."""
    fma, source = _fma(device, threads)
    bf16 = _matmul_gflops(device, torch.bfloat16, (2048,) if device.type == "cpu" else (8192,))
    return {
        "fma_gflops": round(fma, 1),
        "fma_source": source,
        "bf16_gflops": round(bf16, 1),
        "copy_gb_s": round(_copy_gb_s(device), 2),
    }


def highest(before: Mapping, after: Mapping) -> dict:
    """A limit is what was reached before or after the race, whichever is more."""
    return {key: value if isinstance(value, str) else max(value, after[key]) for key, value in before.items()}
