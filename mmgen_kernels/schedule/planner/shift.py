"""Shifts of flow levels towards noise, elementwise in the dtype that diffusers has them in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIME_SHIFTS = ("exponential", "linear")


def by_factor(sigmas: Tensor, factor: float) -> Tensor:
    """factor s / (1 + (factor - 1) s)"""
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def dynamic(sigmas: Tensor, kind: str, mu: float) -> Tensor:
    """w / (w + 1 / s - 1), w = exp(mu) or mu; the same as `by_factor` with w, but for rounding."""
    if kind not in TIME_SHIFTS:
        raise ValueError(f"time_shift_type must be one of {', '.join(TIME_SHIFTS)}, got {kind!r}")
    weight = math.exp(mu) if kind == "exponential" else mu
    # a quotient of tensors: torch rounds number / tensor twice, by way of the reciprocal
    return torch.full_like(sigmas, weight) / (weight + (torch.ones_like(sigmas) / sigmas - 1))


def to_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretched so that the last level is `terminal`."""
    rest = 1 - sigmas
    return 1 - rest / (rest[-1] / (1 - terminal))


def column(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")
