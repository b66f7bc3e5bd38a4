"""Sums over samples in two stages, in fp64: a program per piece leaves its own, and one per sample adds those up in their order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_PIECES = 256


@triton.jit
def leave(partials, program, values, inside):
    """The sum of a piece."""
    tl.store(partials + program, tl.sum(tl.where(inside, values, 0.0).to(tl.float64), 0))


@triton.jit
def add_up(partials, sample, pieces, BLOCK: tl.constexpr):
    """Of a sample's pieces."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for begin in range(0, pieces, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(partials + sample * pieces + i, mask=i < pieces, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def upstream_of(grad, sample):
    """The gradient of a sample's number in fp64, 0 where there is none."""
    found = tl.full([], 0.0, tl.float64)
    if grad is not None:
        found += tl.load(grad + sample).to(tl.float64)
    return found


@triton.jit
def exponential_less_one(x, WIDE: tl.constexpr):
    """e^x - 1, by the series where that is near 0."""
    TERMS: tl.constexpr = 15 if WIDE else 8
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = near * 0.0 + 1.0
    for k in tl.static_range(TERMS):
        series = 1.0 + near * series * (1.0 / (TERMS + 1 - k))
    return tl.where(tl.abs(x) < 0.5, near * series, tl.exp(x) - 1.0)


def pieces_of(size: int, block: int) -> int:
    return max(triton.cdiv(size, block), 1)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
