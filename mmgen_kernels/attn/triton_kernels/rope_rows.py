"""How the rows of qk_norm_rope lie in registers: what both directions share.

A row, the D channels of a head, is held in parts: the first channels of all pairs, the second, and the rest that is not turned,
each a power of two wide, (ROWS, HALF) twice and (ROWS, REST). A pair is then in one thread, and turning it moves nothing between
threads. Where pairs are neighbours in memory a thread loads both at once, and `split` takes them apart in registers.

Where each head has a norm of its own, rows are numbered through all tokens and heads, and a program holds one tile of ROWS of them.
Across heads a program holds a token, whose heads are a few tiles, ((first head, heads), ...). Addresses are 64-bit. Strides are
counted in UNITs: that 72 is a multiple of 8 Triton would not notice, and a thread would load 2 bytes at a time instead of 16.
"""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.attn.triton_kernels.tiles import strides_of, tiles_of
from mmgen_kernels.triton_rounding import divide, narrow, reciprocal_root, widen


class Configuration(NamedTuple):
    tiles: tuple[tuple[int, int], ...]
    half: int
    rest: int
    num_warps: int

    @property
    def rows(self) -> int:
        return self.tiles[0][1]

    def options(self) -> dict[str, object]:
        # without fusion, as everywhere in the package: one arithmetic for a formula, whatever kernel it is in
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def configuration(H: int, D: int, P: int, across: bool, lanes_of_a_thread: int, most_warps: int) -> Configuration:
    """By the sizes of a row alone, as they decide how its sums are added up."""
    half = triton.next_power_of_2(P) if P else 0
    rest = triton.next_power_of_2(D - 2 * P) if D > 2 * P else 0
    lanes = 2 * half + rest
    tiles = tiles_of(H, 1) if across else ((0, 1 << (max(1, lanes_of_a_thread * 128 // lanes).bit_length() - 1)),)
    held = lanes * sum(heads for _, heads in tiles)
    warps = triton.next_power_of_2(triton.cdiv(held, 32 * lanes_of_a_thread))
    return Configuration(tiles, half, rest, min(most_warps, max(4, warps)))


def pairs_of(cos: Tensor | None, D: int, interleaved: bool) -> tuple[int, bool]:
    """Pairs in which rows are held, and whether they are neighbours. Rows without angles are held so too, where they have an even
    number of channels: a part of 128 for the 72 channels of a head spilled, two of 64 do not."""
    return (D // 2 if D % 2 == 0 else 0, True) if cos is None else (cos.shape[-1], interleaved)


def two_floats(value: float) -> tuple[float, float]:
    """What fp32 holds of a number, and the rest: a Python float reaches a kernel as fp32."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def unit_of_tables(*tables: Tensor | None) -> int:
    """As `unit_of`, in fp32, of the strides from row to row."""
    strides = [stride for t in tables if t is not None for stride in t.stride()[:-1]]
    return 4 if all(stride % 4 == 0 for stride in strides) else 1


def located_rows(x: Tensor | None, unit: int) -> tuple[Tensor | None, int, int, int]:
    """(B, T, H, D): where it is, and its strides from sample to sample, token to token and head to head, in units."""
    if x is None:
        return None, 0, 0, 0
    of_sample, of_token, of_head = strides_of(x)
    return x, of_sample // unit, of_token // unit, of_head // unit


def located_table(table: Tensor | None, unit: int) -> tuple[Tensor | None, int, int, int]:
    """(T, P) or (B, T, P): where it is, its strides from sample to sample and token to token, in units, and from pair to pair."""
    if table is None:
        return None, 0, 0, 0
    return table, table.stride(0) // unit if table.dim() == 3 else 0, table.stride(-2) // unit, table.stride(-1)


def is_wide(x: Tensor) -> bool:
    """Whether the computation is in fp64."""
    return x.dtype == torch.float64


# -- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def place_rows(first, rows, T, H, ACROSS: tl.constexpr, TILE: tl.constexpr):
    """Of each row of a tile, (ROWS,): its token's sample and place in it, its head, its number, and whether it is there. `first` is
    the number of the first row, across heads of the token. Divisions are in 32 bits where the number of rows allows."""
    if ACROSS:
        head = TILE[0] + tl.arange(0, TILE[1])
        inside = head < H
        token = (tl.zeros_like(head).to(tl.int64) + first).to(rows.dtype)
    else:
        number = (first + tl.arange(0, TILE[1])).to(rows.dtype)
        inside = number < rows
        token = number // H
        head = number - token * H
    sample = token // T
    place = token - sample * T
    return sample.to(tl.int64), place.to(tl.int64), head.to(tl.int64), token.to(tl.int64) * H + head, inside


@triton.jit
def load_parts(
    pointer, at, inside, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rows that start at `at`, (ROWS,), in parts; 0 outside."""
    parts = ()
    if HALF > 0:
        if INTERLEAVED:
            d = tl.arange(0, 2 * HALF)
            mask = inside[:, None] & (d < 2 * P)[None, :]
            both = widen(tl.load(pointer + at[:, None] + d[None, :], mask=mask, other=0.0), WIDE)
            parts += tl.split(tl.reshape(both, [both.shape[0], HALF, 2]))
        else:
            d = tl.arange(0, HALF)
            mask = inside[:, None] & (d < P)[None, :]
            for half in tl.static_range(2):
                parts += (widen(tl.load(pointer + at[:, None] + (half * P + d)[None, :], mask=mask, other=0.0), WIDE),)
    if REST > 0:
        d = 2 * P + tl.arange(0, REST)
        mask = inside[:, None] & (d < D)[None, :]
        parts += (widen(tl.load(pointer + at[:, None] + d[None, :], mask=mask, other=0.0), WIDE),)
    return parts


@triton.jit
def store_parts(
    pointer, at, inside, parts, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    if HALF > 0:
        if INTERLEAVED:
            d = tl.arange(0, 2 * HALF)
            mask = inside[:, None] & (d < 2 * P)[None, :]
            both = tl.reshape(tl.join(parts[0], parts[1]), [parts[0].shape[0], 2 * HALF])
            tl.store(pointer + at[:, None] + d[None, :], narrow(both, pointer), mask=mask)
        else:
            d = tl.arange(0, HALF)
            mask = inside[:, None] & (d < P)[None, :]
            for half in tl.static_range(2):
                tl.store(pointer + at[:, None] + (half * P + d)[None, :], narrow(parts[half], pointer), mask=mask)
    if REST > 0:
        d = 2 * P + tl.arange(0, REST)
        mask = inside[:, None] & (d < D)[None, :]
        tl.store(pointer + at[:, None] + d[None, :], narrow(parts[len(parts) - 1], pointer), mask=mask)


@triton.jit
def load_affine(
    pointer, head, inside, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACROSS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A weight or a bias in parts: (1, width), across heads (ROWS, width)."""
    if ACROSS:
        parts = load_parts(pointer, head * D, inside, D, P, HALF, REST, INTERLEAVED, WIDE)
    else:
        one = tl.zeros([1], tl.int64)
        parts = load_parts(pointer, one, one == 0, D, P, HALF, REST, INTERLEAVED, WIDE)
    return parts


@triton.jit
def turn(
    parts, cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, sample, place, inside, P: tl.constexpr, BACK: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, TABLE_UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows turned by their tokens' angles, or back."""
    if cos is not None:
        pair = tl.arange(0, HALF)
        mask = inside[:, None] & (pair < P)[None, :]
        column = (pair.to(tl.int64) * cos_p)[None, :]
        c = widen(tl.load(cos + ((sample * cos_b + place * cos_t) * TABLE_UNIT)[:, None] + column, mask=mask, other=0.0), WIDE)
        column = (pair.to(tl.int64) * sin_p)[None, :]
        s = widen(tl.load(sin + ((sample * sin_b + place * sin_t) * TABLE_UNIT)[:, None] + column, mask=mask, other=0.0), WIDE)
        if BACK:
            s = -s
        turned = (parts[0] * c - parts[1] * s, parts[1] * c + parts[0] * s)
        if REST > 0:
            turned += (parts[2],)
    else:
        turned = parts
    return turned


@triton.jit
def total_of(tiles, ACROSS: tl.constexpr):
    """Sums over a row: (ROWS,), across heads (1,)."""
    if ACROSS:
        total = tl.zeros([1], tiles[0][0].dtype)
        for i in tl.static_range(len(tiles)):
            of_tile = tl.sum(tiles[i][0], 1)
            for j in tl.static_range(1, len(tiles[i])):
                of_tile += tl.sum(tiles[i][j], 1)
            total += tl.sum(of_tile, 0, keep_dims=True)
    else:
        total = tl.sum(tiles[0][0], 1)
        for j in tl.static_range(1, len(tiles[0])):
            total += tl.sum(tiles[0][j], 1)
    return total


@triton.jit
def there(part: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """Which columns of a part are channels, (1, width)."""
    if HALF > 0 and part < 2:
        return (tl.arange(0, HALF) < P)[None, :]
    else:
        return (2 * P + tl.arange(0, REST) < D)[None, :]


@triton.jit
def less(
    tiles, mean, H, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ACROSS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Tiles less the mean of each row; 0 where there is no channel."""
    found = ()
    for i in tl.static_range(len(TILES)):
        parts = ()
        for j in tl.static_range(len(tiles[i])):
            mask = there(j, D, P, HALF, REST)
            if ACROSS:
                mask = mask & (TILES[i][0] + tl.arange(0, TILES[i][1]) < H)[:, None]
            parts += (tl.where(mask, tiles[i][j] - mean[:, None], 0.0),)
        found += (parts,)
    return found


@triton.jit
def normalize(
    tiles, H, eps_high, eps_low, NORM: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ACROSS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Tiles of normalized rows, and 1 / deviation. The mean is taken twice: what the rounding of the first leaves of it is the mean
    of the differences."""
    count = (H * D if ACROSS else D) * 1.0
    if NORM == "layer":
        for _ in tl.static_range(2):
            total = total_of(tiles, ACROSS)
            tiles = less(tiles, divide(total, total * 0.0 + count), H, D, P, HALF, REST, ACROSS, TILES)
    squares = ()
    for i in tl.static_range(len(TILES)):
        parts = ()
        for j in tl.static_range(len(tiles[i])):
            parts += (tiles[i][j] * tiles[i][j],)
        squares += (parts,)
    total = total_of(squares, ACROSS)
    rstd = reciprocal_root(divide(total, tl.zeros_like(total) + count) + (tl.zeros_like(total) + eps_high + eps_low))
    normed = ()
    for i in tl.static_range(len(TILES)):
        parts = ()
        for j in tl.static_range(len(tiles[i])):
            parts += (tiles[i][j] * rstd[:, None],)
        normed += (parts,)
    return normed, rstd
