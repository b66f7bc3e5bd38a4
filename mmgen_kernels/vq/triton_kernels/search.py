"""The lookup's pass over all codes on matrix units, and the settlement in fp64 of what its bound leaves open.

Names and bounds: docs/vq.md, "On NVIDIA GPUs".
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmgen_kernels.vq.triton_kernels.prepare import STATISTICS, widen

SETTLED = tl.constexpr(64)  # codes that the settlement holds at a time; divides every BLOCK_K
CHUNKS = tl.constexpr(128)  # minima that it reads at a time
NONE = tl.constexpr(2**62)


@triton.jit
def tile_of_codes(
    codes, start, step, DESCRIPTORS: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Components step .. step + BLOCK_D of the codes start .. start + BLOCK_K: (BLOCK_D, BLOCK_K)."""
    if DESCRIPTORS:
        tile = codes.load([start.to(tl.int32), step]).T
    else:
        k = start + tl.arange(0, BLOCK_K)
        tile = tl.load(codes + k[None, :] * D_PAD + step + tl.arange(0, BLOCK_D)[:, None])
    return tile


@triton.jit(do_not_specialize=["N", "K_PAD", "tiles", "tiles_per_chunk", "chunks", "chunks_per_split"])
def sweep(
    rows, codes, half_squares, ratios, minima, N, K_PAD, tiles, tiles_per_chunk, chunks, chunks_per_split,
    DESCRIPTORS: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """minima (H, chunks, N): the smallest score of each chunk of codes. A score is ratio |c|^2 / 2 - x.c, smaller is nearer.

    `codes` is a pointer to (H, K_PAD, D_PAD), or, with DESCRIPTORS, the descriptor of its (H K_PAD, D_PAD) rows.
    """
    row_blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0)
    h = (block // row_blocks).to(tl.int64)
    n = (block % row_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    first = tl.program_id(1).to(tl.int64) * chunks_per_split * tiles_per_chunk
    last = tl.minimum(first + chunks_per_split * tiles_per_chunk, tiles)
    ratio = tl.load(ratios + h * N + n, mask=inside, other=1.0)
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    x_pointers = rows + (h * N + n[:, None]) * D_PAD + d[None, :]
    if BLOCK_D == D_PAD:
        x = tl.load(x_pointers, mask=inside[:, None], other=0.0)
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    for tile in range(first, last):
        start = h * K_PAD + tile * BLOCK_K
        if BLOCK_D == D_PAD:
            products = tl.dot(x, tile_of_codes(codes, start, 0, DESCRIPTORS, D_PAD, BLOCK_D, BLOCK_K))
        else:
            products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for step in range(0, D_PAD, BLOCK_D):
                x_part = tl.load(x_pointers + step, mask=inside[:, None], other=0.0)
                c_part = tile_of_codes(codes, start, step, DESCRIPTORS, D_PAD, BLOCK_D, BLOCK_K)
                products = tl.dot(x_part, c_part, products)
        score = ratio[:, None] * tl.load(half_squares + start + k)[None, :] - products
        best = tl.minimum(best, tl.min(score, 1))
        after = tile + tl.full((), 1, tl.int64)
        ends = (after == last) | (after % tiles_per_chunk == 0)
        tl.store(minima + (h * chunks + tile // tiles_per_chunk) * N + n, best, mask=n < tl.where(ends, N, 0))
        best = tl.where(ends, float("inf"), best)


@triton.jit
def error_bound(r, row_rest, ratio, norm, code_rest, raw, D, D_PAD: tl.constexpr, METRIC: tl.constexpr):
    """How far a score may lie from what the fp64 value of its code implies."""
    product = (r + row_rest) * (norm + code_rest)
    bound = r * code_rest + row_rest * (norm + code_rest) + D_PAD * 2.0**-22 * product
    bound += 2.0**-22 * (ratio * norm * norm + product)
    if METRIC == "l2":
        inverse = (-ratio.to(tl.int64, bitcast=True) + (2046 << 52)).to(tl.float64, bitcast=True)  # of a power of two: exact
        bound += (D + 4) * 2.0**-53 * (r * r * inverse + ratio * norm * norm)
    elif METRIC == "dot":
        bound += (D + 4) * 2.0**-53 * r * raw
    else:
        bound += (2 * D + 16) * 2.0**-53 * r * raw
    return 1.02 * bound + 2.0**-80


@triton.jit
def defining_values(row, x_d, codes, codebook_k, codebook_d, k, wanted, D, METRIC: tl.constexpr):
    """The value that defines the nearest code, smaller is nearer; +inf where it cannot win or is not wanted.

    A rounding after every multiplication and every addition, d ascending: the launch forbids fused multiply-add.
    """
    total = tl.zeros(k.shape, tl.float64)
    squared = tl.zeros(k.shape, tl.float64)
    for d in range(0, D):
        at = d + tl.zeros((), tl.int64)
        c = widen(tl.load(codes + k.to(tl.int64) * codebook_k + at * codebook_d, mask=wanted, other=0.0))
        v = widen(tl.load(row + at * x_d))
        if METRIC == "l2":
            total += (v - c) * (v - c)
        else:
            total += v * c
        if METRIC == "cosine":
            squared += c * c
    if METRIC == "cosine":
        length = tl.sqrt(squared)
        total = tl.where(length == 0, 0.0, total / tl.where(length == 0, 1.0, length))
    value = total if METRIC == "l2" else -total
    return tl.where(wanted & (value < float("inf")), value, float("inf"))


@triton.jit(do_not_specialize=["N", "K", "K_PAD", "chunks", "codes_per_chunk", "x_h", "codebook_h", "mask_h", "mask_n"])
def settle(
    x, x_h, x_n, x_d, codebook, codebook_h, codebook_k, codebook_d, mask, mask_h, mask_n,
    rows, row_bounds, ratios, codes, half_squares, norms, left_out, chunk_bounds, head, minima, indices,
    N, K, K_PAD, D, chunks, codes_per_chunk,
    METRIC: tl.constexpr, HAS_MASK: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """indices (H, N): one program per row."""
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64)
    valid = tl.full((), 1, tl.int1)
    if HAS_MASK:
        valid = tl.load(mask + h * mask_h + n * mask_n) != 0
    index = tl.full((), -1, tl.int64)
    r = tl.load(row_bounds + (h * N + n) * 2)
    if valid:
        index = tl.full((), 0, tl.int64)
    if valid & (r == r):
        row = x + h * x_h + n * x_n
        book = codebook + h * codebook_h
        row_rest = tl.load(row_bounds + (h * N + n) * 2 + 1)
        ratio = tl.load(ratios + h * N + n).to(tl.float64)
        everything = (tl.load(head + h * STATISTICS + 3) > 0) | (r == float("inf"))
        raw = tl.load(head + h * STATISTICS + 1)
        i = tl.arange(0, CHUNKS)
        j = tl.arange(0, SETTLED).to(tl.int64)

        # The winner's value is at most `reach`, in units of the score.
        reach = tl.full((), float("inf"), tl.float64)
        for start in range(0, chunks, CHUNKS):
            at = start + i.to(tl.int64)
            bounds = chunk_bounds + (h * chunks + at) * 2
            smallest = tl.load(minima + (h * chunks + at) * N + n, mask=at < chunks, other=float("inf")).to(tl.float64)
            longest = tl.load(bounds, mask=at < chunks, other=0.0)
            most_left_out = tl.load(bounds + 1, mask=at < chunks, other=0.0)
            bound = error_bound(r, row_rest, ratio, longest, most_left_out, raw, D, D_PAD, METRIC)
            reach = tl.minimum(reach, tl.min(tl.where(everything, float("inf"), smallest + bound), 0))

        value = tl.full((), float("inf"), tl.float64)
        waiting = tl.full((), 0, tl.int32)  # 1: `index` is the only code met so far within reach, its value not known yet
        lower = tl.full((), float("inf"), tl.float64)  # of that code
        for start in range(0, chunks, CHUNKS):
            at = start + i.to(tl.int64)
            bounds = chunk_bounds + (h * chunks + at) * 2
            smallest = tl.load(minima + (h * chunks + at) * N + n, mask=at < chunks, other=float("inf")).to(tl.float64)
            longest = tl.load(bounds, mask=at < chunks, other=0.0)
            most_left_out = tl.load(bounds + 1, mask=at < chunks, other=0.0)
            bound = error_bound(r, row_rest, ratio, longest, most_left_out, raw, D, D_PAD, METRIC)
            least = tl.where(everything, -float("inf"), smallest - bound)
            chunk = tl.min(tl.where((at < chunks) & (least <= reach), at, NONE), 0)
            while chunk < NONE:
                begin = chunk * codes_per_chunk
                for first in range(begin, tl.minimum(begin + codes_per_chunk, K), SETTLED):
                    k = first + j
                    position = h * K_PAD + k
                    products = tl.zeros((SETTLED,), tl.float32)
                    for step in range(0, D_PAD, BLOCK_D):
                        d = step + tl.arange(0, BLOCK_D)
                        v = tl.load(rows + (h * N + n) * D_PAD + d).to(tl.float32)
                        c = tl.load(codes + position[:, None] * D_PAD + d[None, :]).to(tl.float32)
                        products += tl.sum(v[None, :] * c, 1)
                    score = ratio * tl.load(half_squares + position).to(tl.float64) - products.to(tl.float64)
                    error = error_bound(
                        r, row_rest, ratio, tl.load(norms + position), tl.load(left_out + position), raw, D, D_PAD, METRIC
                    )
                    low = tl.where(everything, -float("inf"), score - error)
                    high = tl.where(everything, float("inf"), score + error)
                    reach = tl.minimum(reach, tl.min(tl.where(k < K, high, float("inf")), 0))
                    possible = (k < K) & (low <= reach)
                    count = tl.sum(possible.to(tl.int32), 0)
                    if (waiting == 1) & (lower > reach):
                        waiting = 0
                        index = tl.full((), 0, tl.int64)
                        lower = tl.full((), float("inf"), tl.float64)
                    if count > 0:
                        if (count == 1) & (waiting == 0) & (value == float("inf")) & (not everything):
                            index = tl.min(tl.where(possible, k, NONE), 0).to(tl.int64)
                            lower = tl.min(tl.where(possible, low, float("inf")), 0)
                            waiting = 1
                        else:
                            if waiting == 1:
                                alone = defining_values(row, x_d, book, codebook_k, codebook_d, index + j, j == 0, D, METRIC)
                                value = tl.min(alone, 0)
                                waiting = 0
                            values = defining_values(row, x_d, book, codebook_k, codebook_d, k, possible, D, METRIC)
                            nearest = tl.min(values, 0)
                            if nearest < value:
                                index = tl.min(tl.where(values == nearest, k, NONE), 0).to(tl.int64)
                                value = nearest
                chunk = tl.min(tl.where((at > chunk) & (at < chunks) & (least <= reach), at, NONE), 0)
    tl.store(indices + h * N + n, index)
