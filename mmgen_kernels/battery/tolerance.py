"""The law for results that round: the error against fp64 may not exceed that of plain PyTorch in the same dtype.

Both errors are measured against an fp64 run. fp16 and bf16: rms at most 1.0x; fp32: rms at most 1.5x and maximum at most 2x.
Nothing can be nearer to fp64 than its rounding to the dtype, so an error as small as that is always allowed: where plain
PyTorch happens to be exact, the law would otherwise ask the impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = {torch.float16: (1.0, 1.0), torch.bfloat16: (1.0, 1.0), torch.float32: (1.5, 2.0)}  # of rms, of the maximum
# fp64 results are compared with fp64 results, whose own rounding errors are of this size in relation to the rms of the truth.
FP64_ROUNDINGS = 64


def failure(name: str, ours: Tensor, plain: Tensor, truth: Tensor) -> tuple[float, str | None]:
    """The relative error of `ours`, and what is wrong with it.

    Args:
        ours: the result under test.
        plain: the same by plain PyTorch in the same dtype.
        truth: the same by an fp64 run.
    """
    if ours.dtype != plain.dtype or ours.shape != truth.shape:
        return float("inf"), f"{name}: got {ours.dtype} {tuple(ours.shape)}, expected {plain.dtype} {tuple(truth.shape)}"
    ours, plain, dtype = ours.detach().cpu().double(), plain.detach().cpu().double(), ours.dtype
    truth = truth.detach().cpu()
    finite = truth.to(dtype).isfinite()
    if not torch.equal(ours.isfinite(), finite):
        return float("inf"), f"{name}: finite where fp64 is not, or the reverse, at {int((ours.isfinite() != finite).sum())} places"
    if truth.numel() == 0 or not finite.any():
        return 0.0, None
    ours, plain, truth = ours[finite], plain[finite], truth[finite]
    error, plain_error, floor = ours - truth, plain - truth, truth.to(dtype).double() - truth
    relative = largest(error) / max(largest(truth), 1e-300)
    if truth.numel() == 1:  # one number may hit fp64 by luck: a unit in the last place is allowed
        floor = torch.maximum(floor.abs(), ulp(truth, dtype))
    if dtype == torch.float64:
        of_rms = of_max = 0.0
        allowed = FP64_ROUNDINGS * torch.finfo(dtype).eps * rms(truth)
    else:
        (of_rms, of_max), allowed = FACTORS[dtype], 0.0
    limits = [("rms", rms(error), max(of_rms * rms(plain_error), rms(floor), allowed))]
    if dtype == torch.float32:
        limits.append(("maximum", largest(error), max(of_max * largest(plain_error), largest(floor))))
    for measure, found, limit in limits:
        if not found <= limit * (1 + 1e-9):  # the comparison itself is made in fp64
            told = f"{name}: {measure} error {found:.3g} against fp64, allowed {limit:.3g}"
            return relative, f"{told} (plain PyTorch: rms {rms(plain_error):.3g}, maximum {largest(plain_error):.3g})"
    return relative, None


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def largest(values: Tensor) -> float:
    return float(values.abs().max())


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at each value."""
    magnitude = values.abs().clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * 2.0 ** magnitude.log2().floor()
