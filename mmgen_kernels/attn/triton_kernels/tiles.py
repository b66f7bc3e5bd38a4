"""How heads, sequences and tiles are found, loaded and multiplied, which all kernels of the family share.

A head of D values is a few tiles, each a power of two wide as Triton wants it: 72 is 64 + 8, not 128 of which 44 % idle. Where D is
contracted a tile has at least 16 columns, as a matrix instruction multiplies 16 at a time, and 72 is 64 + 16 with 8 columns of
zeros. Kernels take both lists as constexprs, ((start, width), ...): IN where D is contracted, OUT where it is not.

Rows are counted within their sequence, so that a packed sequence has the tiles, and the bits, that it has alone. Addresses are
64-bit. Strides are multiples of UNIT, 8 where all of them allow it, and `stride // UNIT * UNIT` says so: Triton itself notices
multiples of 16 only, 72 is none, and without that knowledge a thread would load 2 bytes at a time instead of 16.
"""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VECTOR = 8  # values in 16 bytes, of the 16-bit dtypes


@functools.cache
def tiles_of(D: int, narrowest: int) -> tuple[tuple[int, int], ...]:
    """Powers of two, the largest first, until the rest fits a tile that adds at most a twelfth of D to what `narrowest` demands."""
    tiles, start = [], 0
    while start < D:
        rest = D - start
        width = max(narrowest, triton.next_power_of_2(rest))
        if 12 * (width - triton.cdiv(rest, narrowest) * narrowest) > D:
            width //= 2
        tiles.append((start, width))
        start += width
    return tuple(tiles)


def head_tiles(D: int) -> dict[str, Any]:
    """The constexprs IN and OUT of a kernel."""
    return {"D": D, "IN": tiles_of(D, 16), "OUT": tiles_of(D, 8)}


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dense_rows(tensor: Tensor) -> Tensor:
    """As it is where rows are contiguous, else one copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last. What is alone in its dimension has no next, whatever torch says of its stride."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))


def dense_strides(tensor: Tensor) -> tuple[int, int, int]:
    """That a contiguous tensor of its shape has."""
    _, tokens, heads, D = tensor.shape
    return tokens * heads * D, heads * D, D


def unit_of(*tensors: Tensor) -> int:
    return VECTOR if all(stride % VECTOR == 0 for t in tensors for stride in strides_of(t)) else 1


def located(tensor: Tensor) -> tuple[Any, ...]:
    """(B, T, H, D): where it is, and its strides from sample to sample, token to token and head to head."""
    return tensor, *strides_of(tensor)


def bias_arguments(bias: Tensor | None) -> tuple[Any, ...]:
    """(1 or B, 1 or H, 1 or T, 1 or S): where it is, and its strides, 0 where it is broadcast."""
    if bias is None:
        return None, 0, 0, 0, 0
    return bias, *(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))


def number_of_tiles(rows: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Programs that a head needs: of a packed batch as many as any C sequences could, and what lies outside of them, before and
    after. Nobody asks the device."""
    return triton.cdiv(rows, block) if cu_seqlens is None else rows // block + cu_seqlens.shape[0] + 1

def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def sequences(cu_seqlens: Tensor | None) -> int:
    return 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1


# -- in kernels: who am I ---------------------------------------------------------------------------------------------


@triton.jit
def bound(cu_seqlens, c, C, N):
    """Where the c-th of C + 2 sequences begins. The first and the last are what lies before and after all others."""
    inside = (c >= 1) & (c <= C + 1)
    at = tl.load(cu_seqlens + (c - 1), mask=inside, other=0).to(tl.int64)
    at = tl.minimum(tl.maximum(at, 0), N).to(tl.int32)
    return tl.where(inside, at, tl.where(c < 1, 0, N))


@triton.jit
def locate(tile, cu_own, cu_other, C, N, N_other, BLOCK: tl.constexpr):
    """The sequence that tile belongs to: its start and length, those of its partner, and the tile's first row in it.

    Sequence c may begin at tile `start // BLOCK + c`: from there to the next one's tile there is room for it, however the lengths
    are, and finding c takes a binary search and no sum over all lengths before it.
    """
    if cu_own is None:
        start, length, other, other_length, first = 0, N, 0, N_other, tile * BLOCK
    else:
        low, high = tile * 0, C + 1
        while low < high:
            middle = (low + high + 1) // 2
            begun = bound(cu_own, middle, C, N) // BLOCK + middle <= tile
            low = tl.where(begun, middle, low)
            high = tl.where(begun, high, middle - 1)
        start = bound(cu_own, low, C, N)
        length = bound(cu_own, low + 1, C, N) - start
        other = bound(cu_other, low, C, N_other)
        other_length = tl.maximum(bound(cu_other, low + 1, C, N_other) - other, 0)
        other_length = tl.where((low >= 1) & (low <= C), other_length, 0)
        first = (tile - start // BLOCK - low) * BLOCK
    return start, length, other, other_length, first


@triton.jit
def visible_keys(key_lengths, b, length):
    if key_lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(key_lengths + b).to(tl.int64), 0), length).to(tl.int32)
    return length


@triton.jit
def head_of(pointer, stride_b, stride_t, stride_h, b, start, h, UNIT: tl.constexpr):
    """Row 0 of a sequence's head."""
    at = tl.cast(b, tl.int64) * (stride_b // UNIT * UNIT) + tl.cast(h, tl.int64) * (stride_h // UNIT * UNIT)
    return pointer + (at + tl.cast(start, tl.int64) * (stride_t // UNIT * UNIT))


# -- in kernels: tiles ------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(
    pointer, row, length, stride,
    i: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """TILES[i], (BLOCK, width); 0 beyond D, and where MASKED beyond length. A tile itself is no argument that Triton 3.6 takes."""
    d = TILES[i][0] + tl.arange(0, TILES[i][1])
    at = row.to(tl.int64) * (stride // UNIT * UNIT)
    where = pointer + (at[:, None] + d[None, :])
    if TILES[i][0] + TILES[i][1] > D:
        if MASKED:
            tile = tl.load(where, mask=(row < length)[:, None] & (d < D)[None, :], other=0.0)
        else:
            tile = tl.load(where, mask=(d < D)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(where, mask=(row < length)[:, None], other=0.0)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def load_tiles(pointer, row, length, stride, D: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles += (load_tile(pointer, row, length, stride, i, D, TILES, UNIT, MASKED),)
    return tiles


@triton.jit
def load_block(
    pointer, boxes, place, at, length, stride,
    D: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As load_tiles the rows from `at` on, by the copy engine where a tensor has descriptors, one for each tile.

    place: sample, head and the row of the tensor where the sequence begins. A descriptor knows where the tensor ends, and puts
    zeros beyond its T and D, but not where a sequence does: MASKED rows come by their addresses, or a NaN beyond `length` in a
    row of values would be multiplied by its weight of 0.
    """
    if boxes is None or BOUNDED:
        tiles = load_tiles(pointer, at + tl.arange(0, BLOCK), length, stride, D, TILES, UNIT, BOUNDED)
    else:
        tiles = ()
        for i in tl.static_range(len(TILES)):
            box = boxes[i].load([place[0], place[1], place[2] + at, TILES[i][0]])  # (1, 1, BLOCK, width)
            tiles += (tl.reshape(box, (BLOCK, TILES[i][1])),)
    return tiles


@triton.jit
def load_out_tiles(
    loaded, pointer, row, length, stride,
    D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tiles OUT of rows of which the tiles IN are loaded: only those that differ are loaded again."""
    tiles = ()
    for i in tl.static_range(len(OUT)):
        if i < len(IN) and IN[i][0] == OUT[i][0] and IN[i][1] == OUT[i][1]:
            tiles += (loaded[i],)
        else:
            tiles += (load_tile(pointer, row, length, stride, i, D, OUT, UNIT, MASKED),)
    return tiles


@triton.jit
def store_tiles(pointer, row, length, valid, stride, values, D: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr):
    """Values, rounded once; 0 from the row `valid` on."""
    at = row.to(tl.int64) * (stride // UNIT * UNIT)
    for i in tl.static_range(len(OUT)):
        d = OUT[i][0] + tl.arange(0, OUT[i][1])
        mask = (row < length)[:, None] & (d < D)[None, :]
        kept = tl.where((row < valid)[:, None], values[i], 0.0)
        tl.store(pointer + (at[:, None] + d[None, :]), kept.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def scaled(tiles, factor):
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i] * factor,)
    return products


@triton.jit
def zero_tiles(BLOCK: tl.constexpr, OUT: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(OUT)):
        tiles += (tl.full((BLOCK, OUT[i][1]), 0.0, tl.float32),)
    return tiles


@triton.jit
def contract(a, b):
    """a b^T over the tiles IN, (rows of a, rows of b). fp32 is multiplied as fp32: one tf32 product would keep 10 bits of it."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision="ieee")
    return total


@triton.jit
def accumulate(totals, weights, b):
    """totals + weights b for the tiles OUT; weights are in b's dtype."""
    sums = ()
    for i in tl.static_range(len(b)):
        sums += (tl.dot(weights, b[i], totals[i], input_precision="ieee"),)
    return sums


# Logits of 16-bit inputs are in units of log2 e, so that exp is one instruction without a product before it. Of fp32 inputs they
# are as they are: a saved lse would be rounded once more in those units, which is then the largest error of all gradients.


def unit_of_logits(dtype: torch.dtype) -> float:
    return 1.0 if dtype == torch.float32 else LOG2_E.value


@triton.jit
def exponential(logits, like):
    return tl.exp(logits) if like.dtype.element_ty == tl.float32 else tl.exp2(logits)


@triton.jit
def in_units(values, like):
    return values if like.dtype.element_ty == tl.float32 else values * LOG2_E


@triton.jit
def load_bias(pointer, row, rows, column, columns, stride_t, stride_s, like):
    """Of any float dtype: (M, 1) rows by (1, N) columns, or the transpose."""
    at = row.to(tl.int64) * stride_t + column.to(tl.int64) * stride_s
    bias = tl.load(pointer + at, mask=(row < rows) & (column < columns), other=0.0)
    return in_units(bias.to(tl.float32), like)
