"""How a token's D values lie in registers, and the arithmetic on them that both directions share.

A row is a few tiles, each a power of two wide as Triton wants it: 1152 is 1024 + 128, not 2048 of which 44 % idle. A program holds
ROWS tokens, tiles (ROWS, width), so that a narrow row still fills the threads and a tail of 128 still loads 16 bytes a thread.
Kernels take the tiles as a constexpr, ((start, width), ...). Addresses are 64-bit.
"""

from __future__ import annotations

import contextlib
import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.triton_rounding import narrow, widen

NARROWEST = 128  # below it a further tile saves no time: its loads are less than 4 bytes for each thread of a warp


def tiles_of(D: int, widest: int) -> tuple[tuple[int, int], ...]:
    """Powers of two, the largest first, until the rest fits a tile that leaves at most an eighth of the lanes idle."""
    tiles, start = [], 0
    while start < D:
        rest = D - start
        width = min(widest, triton.next_power_of_2(rest))
        if width > NARROWEST and 8 * (width - rest) > D:
            width //= 2
        tiles.append((start, width))
        start += width
    return tuple(tiles)


def lanes_of(tiles: tuple[tuple[int, int], ...]) -> int:
    return sum(width for _, width in tiles)


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def chip(device: torch.device) -> tuple[int, int]:
    """Compute capability. The interpreter plays an sm_90."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def two_floats(value: float) -> tuple[float, float]:
    """What fp32 holds of a number, and the rest: a Python float reaches a kernel as fp32."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def dense_rows(tensor: Tensor) -> Tensor:
    """As it is where rows are contiguous, else one copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def activation(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """(B, T, D): where it is, and its strides from sample to sample and from token to token."""
    if tensor is None:
        return None, 0, 0
    tensor = dense_rows(tensor)
    return tensor, tensor.stride(0), tensor.stride(1)


def kind_of(vector: Tensor | None, T: int, by_row: bool) -> str:
    """What says which element a token takes: nothing, its sample, its frame, itself, or `rows`."""
    if vector is None or vector.dim() == 1:
        return "shared"
    if by_row:
        return "row"
    if vector.dim() == 2 or vector.shape[1] == 1:
        return "sample"
    return "token" if vector.shape[1] == T else "frame"


def vector_arguments(vector: Tensor | None, T: int, by_row: bool) -> tuple[Tensor | None, int, int, int]:
    """Where it is, its strides from sample to sample (row to row) and from frame to frame, and the tokens of a frame (the number
    of rows)."""
    if vector is None:
        return None, 0, 0, 1
    vector = dense_rows(vector)
    if vector.dim() == 1:
        return vector, 0, 0, 1
    if by_row:
        return vector, vector.stride(0), 0, vector.shape[0]
    if vector.dim() == 2:
        return vector, vector.stride(0), 0, 1
    return vector, vector.stride(0), vector.stride(1), max(1, T // max(1, vector.shape[1]))


def is_wide(x: Tensor | None) -> bool:
    """Whether the computation is in fp64."""
    return x is not None and x.dtype == torch.float64


def dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


# -- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def places_of(token, N, T):
    """Sample and place within it, (ROWS,), in 32 bits where N allows: the division is several times cheaper."""
    index = token.to(N.dtype)
    sample = index // T
    return sample, index - sample * T


@triton.jit
def start_of(outer, inner, span, sample, place, row, KIND: tl.constexpr):
    """Offset of each token's vector, (ROWS,)."""
    if KIND == "row":
        at = tl.minimum(tl.maximum(row, 0), span - 1).to(tl.int64) * outer
    elif KIND == "sample":
        at = sample.to(tl.int64) * outer
    elif KIND == "token":
        at = sample.to(tl.int64) * outer + place.to(tl.int64) * inner
    elif KIND == "frame":
        at = sample.to(tl.int64) * outer + (place // span).to(tl.int64) * inner
    else:
        at = tl.zeros_like(sample).to(tl.int64)
    return at


@triton.jit
def load_tile(pointer, at, inside, D, TILE: tl.constexpr, WIDE: tl.constexpr):
    """(ROWS, width) of rows that start at `at`; 0 outside."""
    d = TILE[0] + tl.arange(0, TILE[1])
    mask = inside[:, None] & (d < D)[None, :]
    return widen(tl.load(pointer + at[:, None] + d[None, :], mask=mask, other=0.0), WIDE)


@triton.jit
def store_tile(pointer, at, inside, values, D, TILE: tl.constexpr):
    d = TILE[0] + tl.arange(0, TILE[1])
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(pointer + at[:, None] + d[None, :], narrow(values, pointer), mask=mask)


@triton.jit
def load_parameter(pointer, row, D, TILE: tl.constexpr, WIDE: tl.constexpr):
    """(1, width) of a row of (V, D)."""
    d = TILE[0] + tl.arange(0, TILE[1])
    return widen(tl.load(pointer + row * D + d, mask=d < D, other=0.0), WIDE)[None, :]


@triton.jit
def load_vector(pointer, at, table, ROW: tl.constexpr, inside, D, TILE: tl.constexpr, WIDE: tl.constexpr):
    """(ROWS, width) of a modulation vector, its row of the table added."""
    values = load_tile(pointer, at, inside, D, TILE, WIDE)
    if table is not None:
        values += load_parameter(table, ROW, D, TILE, WIDE)
    return values


@triton.jit
def tanh(x, WIDE: tl.constexpr):
    """Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))) near 0, where 1 - 2 e / (1 + e) with e = exp(-2|x|)
    cancels. Up to 0.6 five terms leave 6e-10 of it, ten less than 1e-20."""
    size = tl.abs(x)
    square = tl.minimum(size, 0.6) * tl.minimum(size, 0.6)
    TERMS: tl.constexpr = 10 if WIDE else 5
    below = tl.zeros_like(x) + (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 1):
        below = (2 * (TERMS - i) - 3) + square / below
    e = tl.exp(-2.0 * size)
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(size < 0.6, x / below, tl.where(x < 0, -far, far))  # NaN goes the far way


@triton.jit
def gate_value(gate, GATE_FN: tl.constexpr, WIDE: tl.constexpr):
    if GATE_FN == "tanh":
        return tanh(gate, WIDE)
    return 1.0 / (1.0 + tl.exp(gate - 1.0)) if GATE_FN == "sigmoid_one_minus" else gate


@triton.jit
def gate_slope(gate, GATE_FN: tl.constexpr):
    """The derivative: with e = exp(-2|gate|), and exp(-|gate - 1|), no difference of near numbers."""
    if GATE_FN == "tanh":
        e = tl.exp(-2.0 * tl.abs(gate))
        return 4.0 * e / ((1.0 + e) * (1.0 + e))
    if GATE_FN == "sigmoid_one_minus":
        e = tl.exp(-tl.abs(gate - 1.0))
        return -e / ((1.0 + e) * (1.0 + e))
    return tl.zeros_like(gate) + 1.0
