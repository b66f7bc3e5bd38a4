"""What the lookup's pass reads: codes and rows, centred, scaled by powers of two and rounded to fp16, with the norms of what
they are and of what fp16 left out of them, both measured. Names and bounds: docs/vq.md, "On NVIDIA GPUs".

Heads are the last axis of every grid, as the first may be long. Addresses are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

CODES = tl.constexpr(32)  # codes, or rows, that a program holds at a time
STATISTICS = tl.constexpr(4)  # per part of the codebook: sum of squared norms, codes in it, largest squared norm, outside the proof
MERGED = tl.constexpr(64)  # parts added at a time
# Norms are scaled into [2^7, 2^8): no product of components overflows, and what is dropped below fp16's normal numbers is
# 2^-22 of the norm.
LOG2_NORM = tl.constexpr(7)
SMALLEST_NORMAL = tl.constexpr(2.0**-14)
VANISHED = tl.constexpr(2.0**-520)  # more than the norm of components whose squares vanish in fp64
EXTREME = tl.constexpr(800)  # log2 of a squared norm beyond which fp64 itself may overflow or vanish


@triton.jit
def widen(values):
    """fp64. By way of fp32, as the interpreter would take the bits of a bf16 for an integer."""
    return values if values.dtype == tl.float64 else values.to(tl.float32).to(tl.float64)


@triton.jit
def to_wide(values, WIDE: tl.constexpr):
    """What residuals are kept in: fp64 if WIDE, else fp32."""
    return widen(values) if WIDE else values.to(tl.float32)


@triton.jit
def power_of_two(exponent):
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def scale_of(squared):
    """The power of two that takes a vector of this squared norm to a norm in [2^7, 2^8), as far as 2^±400 reach."""
    exponent = (squared.to(tl.int64, bitcast=True) >> 52) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -EXTREME), EXTREME)
    return tl.where(squared > 0, power_of_two(-(exponent >> 1) + LOG2_NORM), 1.0)


@triton.jit
def centring(mean, statistics, D, BLOCK_D: tl.constexpr):
    """1 where subtracting the mean of the codes is worth its roundings, else 0. Every program adds in the same order."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(0, D, BLOCK_D):
        m = tl.load(mean + start + d, mask=start + d < D, other=0.0)
        total += m * m
    return tl.where(tl.sum(total, 0) > 0.5 * tl.load(statistics), 1.0, 0.0).to(tl.float64)


@triton.jit
def largest(values, count, STEP: tl.constexpr = 1):
    """Of `count` non-negative numbers, STEP apart."""
    i = tl.arange(0, 1024)
    most = tl.zeros((1024,), tl.float64)
    for start in range(0, count, 1024):
        most = tl.maximum(most, tl.load(values + (start + i) * STEP, mask=start + i < count, other=0.0))
    return tl.max(most, 0)


@triton.jit
def inverse_lengths(squared, METRIC: tl.constexpr):
    """What takes a code to the vector that the metric sees of it: 1 / |c| for cosine, 0 for a zero code; else 1."""
    inverse = tl.full(squared.shape, 1.0, tl.float64)
    if METRIC == "cosine":
        inverse = tl.where(squared > 0, 1.0 / tl.where(squared > 0, tl.sqrt(squared), 1.0), 0.0)
    return inverse


@triton.jit(do_not_specialize=["K", "parts", "codebook_h"])
def sum_codes(
    codebook, codebook_h, codebook_k, codebook_d,
    squares, sums, statistics, K, D, parts,
    METRIC: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Squared norms of codes as they are, and per part of CODES codes their sum: (H, K), (H, parts, D), (H, parts, STATISTICS).

    A code counts as usable where its square is a number that fp64 holds without loss. An unusable one is not finite, or the
    codebook is fp64: WIDE.
    """
    part = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    k = part * CODES + tl.arange(0, CODES)
    d = tl.arange(0, BLOCK_D)
    inside = k < K
    codes = codebook + h * codebook_h + k[:, None] * codebook_k
    total = tl.zeros((CODES,), tl.float64)
    for start in range(0, D, BLOCK_D):
        at = start + d
        c = widen(tl.load(codes + at[None, :].to(tl.int64) * codebook_d, mask=inside[:, None] & (at < D)[None, :], other=0.0))
        total += tl.sum(c * c, 1)
    usable = inside & (total <= 2.0**EXTREME)  # false for NaN
    if WIDE and METRIC == "cosine":
        usable = usable & ((total == 0) | (total >= 2.0**-EXTREME))
    tl.store(squares + h * K + k, total, mask=inside)
    inverse = inverse_lengths(total, METRIC)
    for start in range(0, D, BLOCK_D):
        at = start + d
        c = widen(tl.load(codes + at[None, :].to(tl.int64) * codebook_d, mask=usable[:, None] & (at < D)[None, :], other=0.0))
        tl.store(sums + (h * parts + part) * D + at, tl.sum(c * inverse[:, None], 0), mask=at < D)
    seen = tl.where(usable, total, 0.0)
    if METRIC == "cosine":
        seen = tl.where(seen > 0, 1.0, 0.0).to(tl.float64)
    outside = tl.where(usable, 0.0, inside.to(tl.float64))
    if METRIC == "l2" and not WIDE:
        outside = tl.zeros((CODES,), tl.float64)  # a code that is not finite never wins: nothing to prove
    out = statistics + (h * parts + part) * STATISTICS
    tl.store(out, tl.sum(seen, 0))
    tl.store(out + 1, tl.sum(usable.to(tl.float64), 0))
    tl.store(out + 2, tl.max(seen, 0))
    tl.store(out + 3, tl.max(outside, 0))


@triton.jit(do_not_specialize=["parts"])
def mean_code(sums, statistics, mean, head, D, parts, BLOCK_D: tl.constexpr):
    """The parts added in fixed order: mean (H, D), and head (H, STATISTICS): mean square, room for the largest norm as scaled,
    largest norm, outside the proof."""
    h = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.arange(0, MERGED).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float64)
    square = tl.zeros((MERGED,), tl.float64)
    count = tl.zeros((MERGED,), tl.float64)
    most = tl.zeros((MERGED,), tl.float64)
    outside = tl.zeros((MERGED,), tl.float64)
    for start in range(0, parts, MERGED):
        part = h * parts + start + i
        inside = start + i < parts
        total += tl.sum(tl.load(sums + part[:, None] * D + at[None, :], mask=inside[:, None] & (at < D)[None, :], other=0.0), 0)
        square += tl.load(statistics + part * STATISTICS, mask=inside, other=0.0)
        count += tl.load(statistics + part * STATISTICS + 1, mask=inside, other=0.0)
        most = tl.maximum(most, tl.load(statistics + part * STATISTICS + 2, mask=inside, other=0.0))
        outside = tl.maximum(outside, tl.load(statistics + part * STATISTICS + 3, mask=inside, other=0.0))
    codes = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(mean + h * D + at, total / codes, mask=at < D)
    if tl.program_id(0) == 0:
        out = head + h * STATISTICS
        tl.store(out, tl.sum(square, 0) / codes)
        tl.store(out + 2, tl.sqrt(tl.max(most, 0)) + VANISHED)
        tl.store(out + 3, tl.max(outside, 0))


@triton.jit(do_not_specialize=["K", "parts", "codebook_h"])
def centred_norms(
    codebook, codebook_h, codebook_k, codebook_d,
    squares, mean, head, centred, part_largest, K, D, parts,
    METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Squared norms of what the pass sees, (H, K), infinite for a code it must not see; and the largest of each part."""
    part = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    k = part * CODES + tl.arange(0, CODES)
    d = tl.arange(0, BLOCK_D)
    inside = k < K
    squared = tl.load(squares + h * K + k, mask=inside, other=0.0)
    usable = inside & (squared <= 2.0**EXTREME)
    inverse = inverse_lengths(squared, METRIC)
    codes = codebook + h * codebook_h + k[:, None] * codebook_k
    weight = centring(mean + h * D, head + h * STATISTICS, D, BLOCK_D)
    total = tl.zeros((CODES,), tl.float64)
    for start in range(0, D, BLOCK_D):
        at = start + d
        read = usable[:, None] & (at < D)[None, :]
        c = widen(tl.load(codes + at[None, :].to(tl.int64) * codebook_d, mask=read, other=0.0))
        m = weight * tl.load(mean + h * D + at, mask=at < D, other=0.0)
        c = tl.where(read, c * inverse[:, None] - m[None, :], 0.0)
        total += tl.sum(c * c, 1)
    tl.store(centred + h * K + k, tl.where(usable, total, float("inf")), mask=inside)
    tl.store(part_largest + h * parts + part, tl.max(tl.where(usable, total, 0.0), 0))


@triton.jit
def to_fp16(values):
    """Rounded, and 0 where fp16 would be subnormal, so that nothing depends on how a matrix unit treats those."""
    rounded = values.to(tl.float16)
    return tl.where(tl.abs(rounded.to(tl.float32)) < SMALLEST_NORMAL, 0.0, rounded.to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=["K", "K_PAD", "parts", "chunks", "codebook_h", "codes_per_chunk"])
def pack_codes(
    codebook, codebook_h, codebook_k, codebook_d,
    squares, mean, head, centred, part_largest,
    packed, half_squares, norms, left_out, chunk_bounds, K, K_PAD, D, parts, chunks, codes_per_chunk,
    METRIC: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """packed (H, K_PAD, D_PAD); half_squares, the score's norm term, norms and left_out (H, K_PAD); their largest per chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    weight = centring(mean + h * D, head + h * STATISTICS, D, BLOCK_D)
    scale = scale_of(largest(part_largest + h * parts, parts))
    longest = tl.zeros((CODES,), tl.float64)
    most_left_out = tl.zeros((CODES,), tl.float64)
    begin = chunk * codes_per_chunk
    for first in range(begin, tl.minimum(begin + codes_per_chunk, K_PAD), CODES):
        k = first + tl.arange(0, CODES).to(tl.int64)
        inside = k < K
        squared = tl.load(squares + h * K + k, mask=inside, other=0.0)
        square = tl.load(centred + h * K + k, mask=inside, other=float("inf"))
        usable = square < float("inf")
        inverse = inverse_lengths(squared, METRIC)
        codes = codebook + h * codebook_h + k[:, None] * codebook_k
        out = packed + (h * K_PAD + k[:, None]) * D_PAD
        rest = tl.zeros((CODES,), tl.float64)
        for start in range(0, D_PAD, BLOCK_D):
            at = start + d
            read = usable[:, None] & (at < D)[None, :]
            c = widen(tl.load(codes + at[None, :].to(tl.int64) * codebook_d, mask=read, other=0.0))
            m = weight * tl.load(mean + h * D + at, mask=at < D, other=0.0)
            c = tl.where(read, (c * inverse[:, None] - m[None, :]) * scale, 0.0)
            rounded = to_fp16(c)
            tl.store(out + at[None, :], rounded)
            error = c - widen(rounded)
            rest += tl.sum(error * error, 1)
        norm = tl.where(usable, (tl.sqrt(square) + VANISHED) * scale, 0.0)
        term = tl.zeros((CODES,), tl.float64)
        if METRIC == "l2":
            term = 0.5 * norm * norm
        position = h * K_PAD + k
        tl.store(half_squares + position, tl.where(usable, term, float("inf")).to(tl.float32))
        tl.store(norms + position, norm)
        tl.store(left_out + position, tl.sqrt(rest))
        longest = tl.maximum(longest, norm)
        most_left_out = tl.maximum(most_left_out, tl.sqrt(rest))
    if chunk == 0:
        tl.store(head + h * STATISTICS + 1, tl.load(head + h * STATISTICS + 2) * scale)
    tl.store(chunk_bounds + (h * chunks + chunk) * 2, tl.max(longest, 0))
    tl.store(chunk_bounds + (h * chunks + chunk) * 2 + 1, tl.max(most_left_out, 0))


@triton.jit
def scale_of_row(total, code_scale, METRIC: tl.constexpr):
    """(scale, its ratio to the codes', is the row covered by the proof), of rows with these squared norms."""
    scale = scale_of(total)
    usable = total <= 2.0**EXTREME  # false for NaN
    ratio = tl.zeros(total.shape, tl.float64) + 1.0
    if METRIC == "l2":
        # A row much shorter than the codes gives up bits that the sum with the norm term would lose anyway; one so much longer
        # that fp32 cannot hold the norm term beside it is left to fp64.
        scale = tl.minimum(scale, code_scale * 2.0**20)
        ratio = scale / code_scale
        usable = usable & (ratio >= 2.0**-100)
    return scale, tl.where(usable, ratio, 1.0), usable


@triton.jit
def norm_of_row(total, scale, usable, METRIC: tl.constexpr, WIDE: tl.constexpr):
    """The row's norm as scaled: infinite where the proof does not cover the row, NaN where no code can win it."""
    norm = tl.where(usable, (tl.sqrt(total) + VANISHED) * scale, float("inf"))
    norm = tl.where(total == total, norm, float("nan"))
    if METRIC == "l2" and not WIDE:  # no square overflows: the row is infinite
        norm = tl.where(total < float("inf"), norm, float("nan"))
    return norm


@triton.jit(do_not_specialize=["N", "parts", "x_h"])
def pack_rows(
    x, x_h, x_n, x_d,
    mean, head, part_largest, packed, ratios, bounds, N, D, parts,
    METRIC: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """packed (H, N, D_PAD), ratios (H, N): the row's scale over the codes'; bounds (H, N, 2): its norm and what fp16 left out.

    A row that the proof does not cover has an infinite norm there, one that no code can win NaN.
    """
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * CODES + tl.arange(0, CODES)
    d = tl.arange(0, BLOCK_D)
    inside = n < N
    rows = x + h * x_h + n[:, None] * x_n
    weight = tl.zeros((), tl.float64)
    if METRIC == "l2":
        weight = centring(mean + h * D, head + h * STATISTICS, D, BLOCK_D)
    total = tl.zeros((CODES,), tl.float64)
    for start in range(0, D, BLOCK_D):
        at = start + d
        read = inside[:, None] & (at < D)[None, :]
        v = widen(tl.load(rows + at[None, :].to(tl.int64) * x_d, mask=read, other=0.0))
        m = weight * tl.load(mean + h * D + at, mask=at < D, other=0.0)
        v = tl.where(read, v - m[None, :], 0.0)
        total += tl.sum(v * v, 1)
    code_scale = tl.full((), 1.0, tl.float64)
    if METRIC == "l2":
        code_scale = scale_of(largest(part_largest + h * parts, parts))
    scale, ratio, usable = scale_of_row(total, code_scale, METRIC)
    rest = tl.zeros((CODES,), tl.float64)
    for start in range(0, D_PAD, BLOCK_D):
        at = start + d
        read = (inside & usable)[:, None] & (at < D)[None, :]
        v = widen(tl.load(rows + at[None, :].to(tl.int64) * x_d, mask=read, other=0.0))
        m = weight * tl.load(mean + h * D + at, mask=at < D, other=0.0)
        v = tl.where(read, (v - m[None, :]) * scale[:, None], 0.0)
        rounded = to_fp16(v)
        tl.store(packed + (h * N + n[:, None]) * D_PAD + at[None, :], rounded, mask=inside[:, None] & (at < D_PAD)[None, :])
        error = v - widen(rounded)
        rest += tl.sum(error * error, 1)
    norm = norm_of_row(total, scale, usable, METRIC, x.dtype.element_ty == tl.float64)
    tl.store(ratios + h * N + n, ratio.to(tl.float32), mask=inside)
    tl.store(bounds + (h * N + n) * 2, norm, mask=inside)
    tl.store(bounds + (h * N + n) * 2 + 1, tl.sqrt(rest), mask=inside)
