"""All levels of residual_quantize in one launch: no other program touches a program's rows between levels.

Scores, bounds and values are those of the lookup (docs/vq.md, "On NVIDIA GPUs"). What differs is how the codes that the bound
leaves open are found: docs/residual-quantize.md, "One launch for all levels".
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmgen_kernels.vq.triton_kernels.prepare import (
    STATISTICS,
    centring,
    largest,
    norm_of_row,
    scale_of,
    scale_of_row,
    to_fp16,
    widen,
)
from mmgen_kernels.vq.triton_kernels.search import SETTLED, defining_values, error_bound, tile_of_codes

OPEN = tl.constexpr(4)  # codes of a row that are evaluated beside one another; a row with more is searched alone
NO_CODE = tl.constexpr(2**31 - 1)
TILES = tl.constexpr(256)  # at most, in a key's last bits
OUTSIDE, NOTHING_WINS = tl.constexpr(-1.0), tl.constexpr(-2.0)  # in place of a margin
CLOSED, TOGETHER, ALONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how a row's index is found: see OPEN
FARTHEST = tl.constexpr(2.0**120)  # a key's limit: the bits of infinity would become those of NaN
FACTS = tl.constexpr(6)  # of a level: is it centred, scale of its codes, longest norm, most left out, raw norm, outside the proof


@triton.jit(do_not_specialize=["parts", "chunks"])
def summarise_levels(mean, head, part_largest, chunk_bounds, facts, D, parts, chunks, BLOCK_D: tl.constexpr):
    """facts (H, FACTS): what every program has to know of a level's codebook, of its parts and chunks."""
    h = tl.program_id(0).to(tl.int64)
    out = facts + h * FACTS
    statistics = head + h * STATISTICS
    tl.store(out, centring(mean + h * D, statistics, D, BLOCK_D))
    tl.store(out + 1, scale_of(largest(part_largest + h * parts, parts)))
    for fact in tl.static_range(2):
        tl.store(out + 2 + fact, largest(chunk_bounds + h * chunks * 2 + fact, chunks, 2))
    tl.store(out + 4, tl.load(statistics + 1))
    tl.store(out + 5, tl.load(statistics + 3))


@triton.jit
def raised_to_fp32(values):
    """Not less than the fp64 values: rounding to nearest loses less than is added, below fp32's normal numbers too."""
    return (values + tl.abs(values) * 2.0**-22 + 2.0**-126).to(tl.float32)


@triton.jit
def packed_rows(residual, read, mean, d, facts, D, METRIC: tl.constexpr, D_PAD: tl.constexpr):
    """fp16 rows (BLOCK_N, D_PAD) as the pass takes them; per row the ratio of scales, and how far above the smallest
    key the winner's may lie: OUTSIDE the proof, or NOTHING_WINS where the index is 0 whatever the codes are."""
    v = widen(tl.load(residual, mask=read, other=0.0))
    if METRIC == "l2":
        v = v - (tl.load(facts) * tl.load(mean + d, mask=d < D, other=0.0))[None, :]
    total = tl.sum(v * v, 1)
    scale, ratio, usable = scale_of_row(total, tl.load(facts + 1), METRIC)
    v = tl.where(usable[:, None], v * scale[:, None], 0.0)
    packed = to_fp16(v)
    error = v - widen(packed)
    row_rest = tl.sqrt(tl.sum(error * error, 1))
    norm = norm_of_row(total, scale, usable, METRIC, False)
    longest, most_left_out = tl.load(facts + 2), tl.load(facts + 3)
    bound = error_bound(norm, row_rest, ratio, longest, most_left_out, tl.load(facts + 4), D, D_PAD, METRIC)
    # and what the number of the tile changes in a key
    bound += TILES * 2.0**-23 * (ratio * longest * longest + (norm + row_rest) * (longest + most_left_out))
    outside = tl.where(usable, tl.load(facts + 5), 1.0)
    margin = tl.where(outside == 0, raised_to_fp32(2 * bound), tl.where(norm == norm, OUTSIDE, NOTHING_WINS))
    return packed, ratio.to(tl.float32), margin


@triton.jit
def nearest_of_all(row, codes, K, D, METRIC: tl.constexpr):
    """The index of one row, by the fp64 values of all codes."""
    index = tl.full((), 0, tl.int32)
    value = tl.full((), float("inf"), tl.float64)
    for first in range(0, K, SETTLED):
        k = first + tl.arange(0, SETTLED)
        values = defining_values(row, 1, codes, D, 1, k, k < K, D, METRIC)
        nearest = tl.min(values, 0)
        if nearest < value:
            index = tl.min(tl.where(values == nearest, k, NO_CODE), 0)
            value = nearest
    return index


@triton.jit(do_not_specialize=["N", "K", "K_PAD", "L", "depth", "tiles", "blocks", "book_step"])
def residual_levels(
    x, taken, codebook, mean, facts, codes, half_squares, residuals, total, indices, partial,
    N, K, K_PAD, D, L, depth, tiles, blocks, book_step,
    METRIC: tl.constexpr, HAS_TAKEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total (N, D), of the codes; indices (N, L) and partial (L, blocks, 2) of the levels that rows take part in: squared norms
    added, and how many rows have a code.

    x (N, D) and codebook (H, K, D) are contiguous. codebook, mean, facts, codes and half_squares of a level are number
    level * book_step of theirs: 0 where all levels share one codebook. `residuals` (blocks * BLOCK_N, D) is
    memory in which a program keeps its rows' residual, at most 32 KiB that stay in the first level of cache: in registers, beside
    two sets of keys, they spilled. Offsets within a block and within a codebook fit 32 bits.
    """
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    j = tl.arange(0, BLOCK_K)
    slot = tl.arange(0, OPEN)
    first = block * BLOCK_N
    inside = i < N - first
    until = tl.where(inside, depth, 0)  # (BLOCK_N,), of levels
    if HAS_TAKEN:  # read in the residual's layout, as bits that go from layout to layout go by way of local memory
        once = inside[:, None] & (d == 0)[None, :]
        until = tl.max(tl.load(taken + first + i[:, None] + 0 * d[None, :], mask=once, other=0).to(tl.int32), 1)
    cells = i[:, None] * D + d[None, :]
    read = inside[:, None] & (d < D)[None, :]
    r = tl.load(x + first * D + cells, mask=read, other=0.0).to(tl.float32)  # (BLOCK_N, D_PAD)
    sums = total + first * D
    residual = residuals + first * D
    tl.store(residual + cells, r, mask=read)
    for level in range(0, tl.max(until, 0)):
        book = (level * book_step).to(tl.int64)
        level_codes = codebook + book * K * D
        tl.debug_barrier()  # what other threads wrote of the residual
        level_facts = facts + book * FACTS
        read = inside[:, None] & (d < D)[None, :]
        rows, ratio, margin = packed_rows(residual + cells, read, mean + book * D, d, level_facts, D, METRIC, D_PAD)
        margin = tl.where(level < until, margin, NOTHING_WINS)

        # Of each row and each place in a tile: the smallest key and the second smallest. A key is a score whose last bits are
        # the number of its tile.
        best = tl.full((BLOCK_N, BLOCK_K), FARTHEST, tl.float32)
        second = tl.full((BLOCK_N, BLOCK_K), FARTHEST, tl.float32)
        for tile in range(0, tiles):
            start = book * K_PAD + tile * BLOCK_K
            products = tl.dot(rows, tile_of_codes(codes, start, 0, DESCRIPTORS, D_PAD, D_PAD, BLOCK_K))
            score = tl.minimum(ratio[:, None] * tl.load(half_squares + start + j)[None, :] - products, FARTHEST)
            key = ((score.to(tl.int32, bitcast=True) & -TILES) | tile).to(tl.float32, bitcast=True)
            second = tl.minimum(second, tl.maximum(best, key))
            best = tl.minimum(best, key)

        least = tl.min(best, 1)
        covered = margin >= 0  # false for NaN
        reach = tl.where(covered & (least < 0.5 * FARTHEST), raised_to_fp32(widen(least) + widen(margin)), -float("inf"))
        k = (best.to(tl.int32, bitcast=True) & (TILES - 1)) * BLOCK_K + j[None, :]
        k = tl.where(best <= reach[:, None], k, NO_CODE)
        count = tl.sum((k < NO_CODE).to(tl.int32), 1)
        hidden = tl.max((second <= reach[:, None]).to(tl.int32), 1) != 0
        alone = (margin == OUTSIDE) | (covered & (hidden | (count > OPEN)))
        state = tl.where(alone, ALONE, tl.where(covered & (count > 1), TOGETHER, CLOSED))
        index = tl.min(k, 1)
        index = tl.where(index < NO_CODE, index, 0)
        if tl.max(state, 0) != CLOSED:
            if tl.sum((state == TOGETHER).to(tl.int32), 0) != 0:
                k = tl.where((state == TOGETHER)[:, None], k, NO_CODE)
                candidates = tl.full((BLOCK_N, OPEN), NO_CODE, tl.int32)
                for s in tl.static_range(OPEN):
                    lowest = tl.min(k, 1)
                    candidates = tl.where(slot[None, :] == s, lowest[:, None], candidates)
                    k = tl.where(k == lowest[:, None], NO_CODE, k)
                wanted = candidates < NO_CODE
                values = defining_values(residual + i[:, None] * D, 1, level_codes, D, 1, candidates, wanted, D, METRIC)
                nearest = tl.min(values, 1)
                won = wanted & (values == nearest[:, None]) & (values < float("inf"))
                found = tl.min(tl.where(won, candidates, NO_CODE), 1)
                index = tl.where(state == TOGETHER, tl.where(found < NO_CODE, found, 0), index)
            row = tl.min(tl.where(state == ALONE, i, BLOCK_N), 0)
            while row < BLOCK_N:
                index = tl.where(i == row, nearest_of_all(residual + row * D, level_codes, K, D, METRIC), index)
                row = tl.min(tl.where((state == ALONE) & (i > row), i, BLOCK_N), 0)

        index = tl.where(level < until, index, -1)
        has_code = index >= 0
        read = has_code[:, None] & (d < D)[None, :]
        c = tl.load(level_codes + index[:, None] * D + d[None, :], mask=read, other=0.0).to(tl.float32)  # (BLOCK_N, D_PAD)
        rest = tl.load(residual + cells, mask=read, other=0.0) - c
        squared = tl.sum(widen(rest) * widen(rest), 1)
        finite = squared < float("inf")  # false for NaN
        if level > 0:
            c += tl.load(sums + cells, mask=read, other=0.0)
        tl.debug_barrier()  # no thread evaluates rows any more
        tl.store(residual + cells, tl.where(finite[:, None], rest, float("nan")), mask=read)
        tl.store(sums + cells, tl.where(finite[:, None], c, float("nan")), mask=read)
        tl.store(indices + first * L + i * L + level, index.to(tl.int64), mask=level < until)
        pair = partial + (tl.full((), 0, tl.int64) + level) * blocks * 2 + block * 2
        tl.store(pair, tl.sum(tl.where(has_code, tl.where(finite, squared, float("nan")), 0.0), 0))
        tl.store(pair + 1, tl.sum(has_code.to(tl.float64), 0))
