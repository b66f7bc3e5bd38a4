"""The sweeps of code_entropy over rows and codes in Triton: scores by tiles, and what is added up of them along either side.

Rows and codes come prepared, contiguous and in fp32, so that a score over the temperature is row . code + offset. Sums over tiles
go to one slot per range of tiles, and the launcher adds the slots in order. Names: csrc/vq/code_entropy_tables.h. Heads are the
last axis of every grid. Products are of full fp32 ("ieee"), which no matrix unit has.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(1e30)  # the largest score of a row that does not count: all its probabilities are 0
NEGLIGIBLE = tl.constexpr(-64.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # times any exponent of fp32 it is exact
LN2_LOW = tl.constexpr(-2.1219444005469058e-4)


@triton.jit
def exponential(x):
    """e^x for x <= 0, 0 from e^-87 on. tl.exp multiplies by log2(e) first, whose rounding costs |x| ulp."""
    limited = tl.where(x < -87.0, -87.0, x)
    n = tl.floor(limited * LOG2_E + 0.5)
    r = (limited - n * LN2_HIGH) - n * LN2_LOW
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, tl.exp2(r * LOG2_E) * power)


@triton.jit
def tile_of_scores(
    rows, codes, offsets, n, k, N, K, D, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """(BLOCK_N, BLOCK_K); -NOWHERE for codes that are not there. Pieces of D are added up, which rounds less than one chain."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, D, BLOCK_D):
        at = start + d
        x = tl.load(rows + n[:, None] * D + at[None, :], mask=(n < N)[:, None] & (at < D)[None, :], other=0.0)
        c = tl.load(codes + k[None, :] * D + at[:, None], mask=(k < K)[None, :] & (at < D)[:, None], other=0.0)
        total += tl.dot(x, c, input_precision="ieee")
    return total + tl.load(offsets + k, mask=k < K, other=-NOWHERE)[None, :]


@triton.jit(do_not_specialize=["N", "K", "tiles", "tiles_per_range", "ranges"])
def reduce_codes(
    rows, codes, offsets, found, N, K, D, tiles, tiles_per_range, ranges,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """found (H, 3, ranges, N): per row the largest score, the sum of e^(score - largest) and of that times the exponent."""
    part = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, codes, offsets = rows + h * N * D, codes + h * K * D, offsets + h * K
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(part * tiles_per_range, tl.minimum(tiles, (part + 1) * tiles_per_range)):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        score = tile_of_scores(rows, codes, offsets, n, k, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        most = tl.maximum(largest, tl.max(score, 1))  # passes NaN over, which the exponentials then keep
        rise = tl.where(total == 0, 0.0, most - largest)
        shrink = exponential(-rise)
        below = score - most[:, None]
        e = exponential(below)
        weighted = shrink * (weighted - rise * total) + tl.sum(e * below, 1)
        total = shrink * total + tl.sum(e, 1)
        largest = most
    out = found + (h * 3 * ranges + part) * N + n
    tl.store(out, largest, mask=n < N)
    tl.store(out + ranges * N, total, mask=n < N)
    tl.store(out + 2 * ranges * N, weighted, mask=n < N)


@triton.jit(do_not_specialize=["N", "K", "blocks", "blocks_per_range", "ranges"])
def add_probabilities(
    rows, codes, offsets, largest, inverse_total, found, N, K, D, blocks, blocks_per_range, ranges,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """found (H, ranges, K): sums of probabilities over ranges of rows."""
    part = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows, codes, offsets = rows + h * N * D, codes + h * K * D, offsets + h * K
    total = tl.zeros((BLOCK_K,), tl.float32)
    for block in range(part * blocks_per_range, tl.minimum(blocks, (part + 1) * blocks_per_range)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        most = tl.load(largest + h * N + n, mask=n < N, other=NOWHERE)
        inverse = tl.load(inverse_total + h * N + n, mask=n < N, other=0.0)
        score = tile_of_scores(rows, codes, offsets, n, k, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        total += tl.sum(exponential(score - most[:, None]) * inverse[:, None], 0)
    tl.store(found + (h * ranges + part) * K + k, total, mask=k < K)


@triton.jit(do_not_specialize=["N", "K", "tiles", "tiles_per_range", "ranges"])
def add_weighted(
    rows, codes, offsets, largest, weights, found, N, K, D, tiles, tiles_per_range, ranges,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """found (H, ranges, N): per row the sum of e^(score - largest) weights[k]."""
    part = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, codes, offsets = rows + h * N * D, codes + h * K * D, offsets + h * K
    most = tl.load(largest + h * N + n, mask=n < N, other=NOWHERE)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(part * tiles_per_range, tl.minimum(tiles, (part + 1) * tiles_per_range)):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(weights + h * K + k, mask=k < K, other=0.0)
        score = tile_of_scores(rows, codes, offsets, n, k, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        total += tl.sum(exponential(score - most[:, None]) * weight[None, :], 1)
    tl.store(found + (h * ranges + part) * N + n, total, mask=n < N)


@triton.jit
def tile_of_gradients(
    rows, codes, offsets, terms, weights, n, k, N, K, D,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the scores. terms (5, N): largest, inverse_total, mean_below, slope, constant; all of one head."""
    inside = n < N
    most = tl.load(terms + n, mask=inside, other=NOWHERE)
    inverse = tl.load(terms + N + n, mask=inside, other=0.0)
    mean_below = tl.load(terms + 2 * N + n, mask=inside, other=0.0)
    slope = tl.load(terms + 3 * N + n, mask=inside, other=0.0)
    constant = tl.load(terms + 4 * N + n, mask=inside, other=0.0)
    weight = tl.load(weights + k, mask=k < K, other=0.0)
    below = tile_of_scores(rows, codes, offsets, n, k, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D) - most[:, None]
    p = exponential(below) * inverse[:, None]
    along = weight[None, :] + constant[:, None] + slope[:, None] * (below - mean_below[:, None])
    return tl.where(below < NEGLIGIBLE, (mean_below - mean_below)[:, None], p * along)  # NaN in a row that is not finite


@triton.jit(do_not_specialize=["N", "K", "tiles", "tiles_per_range", "ranges", "columns"])
def gradients_of_rows(
    rows, codes, offsets, terms, weights, found, sums, N, K, D, tiles, tiles_per_range, ranges, columns,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """found (H, ranges, N, D): sum_k G code, BLOCK_OUT of the columns a program; sums (H, ranges, N): sum_k G."""
    part = (tl.program_id(1) // columns).to(tl.int64)
    column = tl.program_id(1) % columns
    h = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows, codes, offsets = rows + h * N * D, codes + h * K * D, offsets + h * K
    terms, weights = terms + h * 5 * N, weights + h * K
    total = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    of_rows = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(part * tiles_per_range, tl.minimum(tiles, (part + 1) * tiles_per_range)):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        g = tile_of_gradients(rows, codes, offsets, terms, weights, n, k, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        c = tl.load(codes + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.dot(g, c, input_precision="ieee")
        of_rows += tl.sum(g, 1)
    out = (h * ranges + part) * N + n
    tl.store(found + out[:, None] * D + d[None, :], total, mask=(n < N)[:, None] & (d < D)[None, :])
    if column == 0:
        tl.store(sums + out, of_rows, mask=n < N)


@triton.jit(do_not_specialize=["N", "K", "blocks", "blocks_per_range", "ranges", "columns"])
def gradients_of_codes(
    rows, codes, offsets, terms, weights, found, sums, N, K, D, blocks, blocks_per_range, ranges, columns,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """found (H, ranges, K, D): sum_n G row; sums (H, ranges, K): sum_n G."""
    part = (tl.program_id(1) // columns).to(tl.int64)
    column = tl.program_id(1) % columns
    h = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows, codes, offsets = rows + h * N * D, codes + h * K * D, offsets + h * K
    terms, weights = terms + h * 5 * N, weights + h * K
    total = tl.zeros((BLOCK_K, BLOCK_OUT), tl.float32)
    of_codes = tl.zeros((BLOCK_K,), tl.float32)
    for block in range(part * blocks_per_range, tl.minimum(blocks, (part + 1) * blocks_per_range)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        g = tile_of_gradients(rows, codes, offsets, terms, weights, n, k, N, K, D, BLOCK_N, BLOCK_K, BLOCK_D)
        x = tl.load(rows + n[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.dot(tl.trans(g), x, input_precision="ieee")
        of_codes += tl.sum(g, 0)
    out = (h * ranges + part) * K + k
    tl.store(found + out[:, None] * D + d[None, :], total, mask=(k < K)[:, None] & (d < D)[None, :])
    if column == 0:
        tl.store(sums + out, of_codes, mask=k < K)
