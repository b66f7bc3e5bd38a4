"""scheduler_step and guidance: one kernel, one launch, every tensor read once and every output written once.

Two options need a number of each sample first, and take launches before it: a rescaled guidance one, for sums that each program
of the step then adds up in the same order; a threshold one that makes the derived value, and torch.sort.
"""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.schedule.triton_kernels.pieces import (
    BLOCK,
    OPTIONS,
    Samples,
    add_term,
    folded,
    key_of,
    load,
    multiple_of_8,
    normals,
    number,
    numbers_of,
    on,
    places,
    real,
    rounded,
    start_of_stream,
    store,
)
from mmgen_kernels.triton_rounding import divide

PARTS_OF_SAMPLE = 256  # whose sums a program of the step adds up at once
# where the numbers of a call are; its rows follow one another from ROWS on
SCALE, RESCALE, BOUND, SHARE, ROWS = map(tl.constexpr, range(5))
INTEGERS = ["u0_b", "u1_b", "u2_b", "u3_b", "u4_b", "uncond_b", "noise_b", "variance_b"]
INTEGERS += ["size", "pieces", "parts", "step", "steps", "rank"]


@triton.jit
def exponential(x, WIDE: tl.constexpr):
    """e^x in fp32 as csrc/simd/vectors.h has it, within 1 ulp: tl.exp is a power of 2 on a GPU, whose argument was rounded."""
    if WIDE:
        result = tl.exp(x)
    else:
        zero = tl.zeros_like(x)
        limited = tl.where(x > 88.37, 88.37, x)
        n = tl.floor(tl.fma(limited, zero + 1.44269502, zero + 0.5))
        r = tl.fma(n, zero + 2.12194442e-4, tl.fma(n, zero - 0.693359375, limited))
        q = tl.fma(r, zero + 1.38145394e-3, zero + 8.36874545e-3)
        q = tl.fma(r, q, zero + 4.16683890e-2)
        q = tl.fma(r, q, zero + 1.66665211e-1)
        q = tl.fma(r, q, zero + 4.99999940e-1)
        value = tl.fma(r * r, q, r) + 1.0
        power = ((tl.where(n == n, n, 0.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        result = tl.where(x < -87.33654, 0.0, value * power)
    return result


@triton.jit
def coefficient(numbers, row, K: tl.constexpr, J: tl.constexpr, N: tl.constexpr, FOLDS: tl.constexpr, PARTS: tl.constexpr):
    """Of term J in row K: of the host's numbers; or of a row of the table, and then, if nothing limits the derived value, with its
    share of that, which the host's have already."""
    if row is None:
        value = number(numbers, ROWS + K * (N + 2) + J, PARTS)
    else:
        value = tl.load(row + K * (N + 2) + J)
        if FOLDS and K > 0:
            share = tl.load(row + K * (N + 2) + N)
            first = tl.load(row + J)
            value = tl.where((share == 0.0) | (first == 0.0), value, value + share * first)
    return value


@triton.jit
def total_of(tiles, z, numbers, row, rescaled, K: tl.constexpr, PRESENT: tl.constexpr, GUIDED: tl.constexpr, ORDER: tl.constexpr,
             FOLDS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The sum of row K without the derived value, (BLOCK,)."""
    N: tl.constexpr = len(ORDER)
    total = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    for o in tl.static_range(N):
        if PRESENT[K][ORDER[o]]:
            factor = coefficient(numbers, row, K, ORDER[o], N, FOLDS, PARTS)
            if rescaled is not None and ORDER[o] == GUIDED:
                factor = factor * rescaled
            total = add_term(total, real(factor, WIDE), tiles[ORDER[o]], row is not None)
    if PRESENT[K][N + 1]:
        factor = real(coefficient(numbers, row, K, N + 1, N, FOLDS, PARTS), WIDE)
        total = add_term(total, factor, z, row is not None)
    return total


@triton.jit
def guided_tile(cond, uncond, numbers, PARTS: tl.constexpr, WIDE: tl.constexpr):
    scale = tl.zeros_like(cond) + real(number(numbers, SCALE, PARTS), WIDE)
    return tl.fma(scale, cond - uncond, uncond)


@triton.jit
def rescaling(sums, parts, sample, size, numbers, PARTS: tl.constexpr, MOST: tl.constexpr):
    """What brings the deviation of a sample's guided prediction back to the conditional one's: from the sums of its parts."""
    part = tl.arange(0, MOST)
    at = sums + (sample * parts + part) * 4
    inside = part < parts
    cond, cond_squares = tl.sum(tl.load(at, mask=inside, other=0.0), 0), tl.sum(tl.load(at + 1, mask=inside, other=0.0), 0)
    guided, guided_squares = tl.sum(tl.load(at + 2, mask=inside, other=0.0), 0), tl.sum(tl.load(at + 3, mask=inside, other=0.0), 0)
    n = size.to(tl.float64)  # n (n - 1) times the variances, of which the quotient is taken
    of_cond, of_guided = n * cond_squares - cond * cond, n * guided_squares - guided * guided
    of_cond, of_guided = tl.where(of_cond < 0.0, 0.0, of_cond), tl.where(of_guided < 0.0, 0.0, of_guided)  # NaN stays NaN
    rescale = number(numbers, RESCALE, PARTS)
    return rescale * tl.sqrt(of_cond / of_guided) + (1.0 - rescale)


@triton.jit
def threshold_of(ordered, sample, size, rank, numbers, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """The quantile of a sample's ordered magnitudes, between 1 and the greatest allowed; NaN, which is ordered last, stays."""
    at = ordered + sample * size
    below, last = tl.load(at + rank), tl.load(at + size - 1)
    above = tl.load(at + tl.minimum(rank.to(tl.int64) + 1, size - 1))
    found = below + real(number(numbers, SHARE, PARTS), WIDE) * (above - below)
    most = real(number(numbers, BOUND, PARTS), WIDE)
    found = tl.where(found < 1.0, 1.0, found)
    found = tl.where(found > most, most, found)
    return tl.where(last != last, last, found)


@triton.jit(do_not_specialize=INTEGERS)
def take_step(
    u0, u0_b, u1, u1_b, u2, u2_b, u3, u3_b, u4, u4_b, uncond, uncond_b, noise, noise_b, variance, variance_b,
    out_0, out_1, out_2, numbers, table, index, key, sums, ordered, size, pieces, parts, step, steps, rank,
    ORDER: tl.constexpr, PRESENT: tl.constexpr, GUIDED: tl.constexpr, LIMIT: tl.constexpr, MEASURES: tl.constexpr,
    STEP_PER_SAMPLE: tl.constexpr, KEY_PER_SAMPLE: tl.constexpr, PARTS: tl.constexpr, MOST: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A piece of a sample. PRESENT[k][j]: whether row k has term j, by the host's numbers; a row of the table says so itself.
    MEASURES: nothing but the magnitudes of the derived value, before it is limited."""
    N: tl.constexpr = len(ORDER)
    size = multiple_of_8(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    sample, piece = program // pieces, program % pieces
    at = tl.minimum(tl.maximum(step, 0), steps - 1).to(tl.int64)
    if index is not None:
        wanted = tl.load(index + sample) if STEP_PER_SAMPLE else tl.load(index)
        at = tl.minimum(tl.maximum(wanted, 0), steps - 1).to(tl.int64)
    R: tl.constexpr = len(PRESENT) + (0 if variance is None else 1)
    row = None if table is None else table + at * (R * (N + 2))
    block, lead = start_of_stream(sample, size, KEY_PER_SAMPLE)
    i, inside = places(piece, size, lead, BLOCK, key is not None and not KEY_PER_SAMPLE and not ALIGNED)

    tiles = ()
    pointers = (u0, u1, u2, u3, u4)
    strides = (u0_b, u1_b, u2_b, u3_b, u4_b)
    for j in tl.static_range(N):
        if pointers[j] is None:
            tiles += (0,)
        else:
            tile = load(pointers[j], sample, strides[j], i, inside, ALIGNED, WIDE)
            if uncond is not None and j == GUIDED:
                tile = guided_tile(tile, load(uncond, sample, uncond_b, i, inside, ALIGNED, WIDE), numbers, PARTS, WIDE)
            tiles += (tile,)
    rescaled = None
    if sums is not None:
        rescaled = rescaling(sums, parts, sample, size, numbers, PARTS, MOST)

    z = None
    if key is not None:
        seed, offset = key_of(key, sample, KEY_PER_SAMPLE)
        seed, offset = folded(seed, offset, at)
        z = normals(seed, offset, block + piece * (BLOCK // 4), BLOCK, WIDE)
    elif noise is not None:
        z = load(noise, sample, noise_b, i, inside, ALIGNED, WIDE)
    if variance is not None and z is not None:
        v = load(variance, sample, variance_b, i, inside, ALIGNED, WIDE)
        if row is None:
            middle, slope = number(numbers, ROWS + (R - 1) * (N + 2), PARTS), number(numbers, ROWS + (R - 1) * (N + 2) + 1, PARTS)
        else:
            low, high = tl.load(row + (R - 1) * (N + 2)), tl.load(row + (R - 1) * (N + 2) + 1)
            middle, slope = (low + high) / 4.0, (high - low) / 4.0
        exponent = tl.fma(tl.zeros_like(v) + real(slope, WIDE), v, tl.zeros_like(v) + real(middle, WIDE))
        z = z * exponential(exponent, WIDE)

    FOLDS: tl.constexpr = LIMIT is None and not MEASURES
    derived = None
    if not FOLDS:
        derived = total_of(tiles, z, numbers, row, rescaled, 0, PRESENT, GUIDED, ORDER, FOLDS, PARTS, WIDE, BLOCK)
    if MEASURES:
        store(out_0, sample, size, i, inside, tl.abs(derived))
    else:
        if LIMIT is not None:
            if LIMIT == "clamp":
                bound = real(number(numbers, BOUND, PARTS), WIDE)
            else:
                bound = threshold_of(ordered, sample, size, rank, numbers, PARTS, WIDE)
            derived = tl.where(derived > bound, bound, derived)  # NaN stays
            derived = tl.where(derived < -bound, -bound, derived)
            if LIMIT == "threshold":
                derived = divide(derived, tl.zeros_like(derived) + bound)
        outputs = (out_0, out_1, out_2)
        for k in tl.static_range(3):
            if outputs[k] is not None:
                total = total_of(tiles, z, numbers, row, rescaled, 1 + k, PRESENT, GUIDED, ORDER, FOLDS, PARTS, WIDE, BLOCK)
                if LIMIT is not None and PRESENT[1 + k][N]:
                    share = real(coefficient(numbers, row, 1 + k, N, N, FOLDS, PARTS), WIDE)
                    total = add_term(total, share, derived, row is not None)
                store(outputs[k], sample, size, i, inside, total)


@triton.jit(do_not_specialize=["cond_b", "uncond_b", "size", "parts", "length"])
def add_up(cond, cond_b, uncond, uncond_b, sums, numbers, size, parts, length,
           PARTS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A part of a sample: the sums, in fp64, of the conditional prediction, of its squares, and of the guided one's."""
    size = multiple_of_8(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    sample, part = program // parts, program % parts
    zero = tl.zeros([BLOCK], tl.float64)
    first, first_squares, second, second_squares = zero, zero, zero, zero
    for b in range(0, length):
        i, inside = places(part * length + b, size, 0, BLOCK, False)
        a = load(cond, sample, cond_b, i, inside, ALIGNED, WIDE)
        g = guided_tile(a, load(uncond, sample, uncond_b, i, inside, ALIGNED, WIDE), numbers, PARTS, WIDE).to(tl.float64)
        a = a.to(tl.float64)
        first += a
        first_squares += a * a
        second += g
        second_squares += g * g
    at = sums + program * 4
    tl.store(at, tl.sum(first, 0))
    tl.store(at + 1, tl.sum(first_squares, 0))
    tl.store(at + 2, tl.sum(second, 0))
    tl.store(at + 3, tl.sum(second_squares, 0))


# -- launchers --------------------------------------------------------------------------------------------------------


def scheduler_step(
    input_0: Tensor,
    coefficients: Tensor,
    step: int,
    dtype_0: torch.dtype,
    input_1: Tensor | None,
    dtype_1: torch.dtype | None,
    input_2: Tensor | None,
    input_3: Tensor | None,
    input_4: Tensor | None,
    dtype_2: torch.dtype | None,
    clamp: float | None,
    noise: Tensor | None,
    key: Tensor | None,
    index: Tensor | None,
    uncond: Tensor | None,
    guided: int,
    guidance_scale: float,
    guidance_rescale: float,
    variance: Tensor | None,
    threshold: float | None,
    threshold_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [u for u in (input_0, input_1, input_2, input_3, input_4) if u is not None]
    n = len(inputs)
    limit = "clamp" if clamp is not None else None if threshold is None else "threshold"
    outputs = [input_0.new_empty(0 if d is None else input_0.shape, dtype=d or dtype_0) for d in (dtype_0, dtype_1, dtype_2)]
    made = [output if d is not None else None for output, d in zip(outputs, (dtype_0, dtype_1, dtype_2), strict=True)]
    if input_0.numel() == 0:
        return outputs[0], outputs[1], outputs[2]
    everything = (*inputs, uncond, noise, variance)
    wide = any(t is not None and t.dtype == torch.float64 for t in everything)
    parts = 3 if wide or (uncond is not None and guidance_rescale != 0) else 1
    has_noise = noise is not None or key is not None
    if index is None and coefficients.device.type == "cpu":
        step = min(max(step, 0), len(coefficients) - 1)
        rows = rows_of(coefficients[step].tolist(), n, variance is not None, limit is not None)
        present = [[(rounded(f) if parts == 1 else f) != 0 for f in row] for row in rows[: len(rows) - (variance is not None)]]
        table = None
    else:
        rows, table = [], coefficients.contiguous()
        present = [[True] * (n + 2)] * (coefficients.shape[1] - (variance is not None))
    for row in present:
        row[n + 1] = row[n + 1] and has_noise
    used = [any(row[j] for row in present) for j in range(n + 2)]
    if not used[guided]:
        uncond = None
    if not used[n + 1]:
        noise = key = None
    pads = [None] * (5 - n)
    by_sample = (index is not None and index.dim() == 1) or (key is not None and key.dim() == 2)
    by_sample |= threshold is not None or (uncond is not None and guidance_rescale != 0)
    read = [u if use else None for u, use in zip(inputs, used, strict=False)]
    samples = Samples(input_0, (*read, *pads, uncond, noise, variance if used[n + 1] else None), by_sample)
    rank = 0.0 if threshold is None else threshold * (samples.size - 1)
    constants = (guidance_scale, guidance_rescale, threshold_max if clamp is None else clamp, rank - math.floor(rank))
    numbers = numbers_of((*constants, *(f for row in rows for f in row)), parts)
    with on(input_0):
        sums, sample_parts = None, 1
        if uncond is not None and guidance_rescale != 0:
            sums, sample_parts = sums_of(samples, guided, numbers, parts, wide)
        pieces = triton.cdiv(samples.size + (3 if key is not None and samples.count > 1 else 0), BLOCK)

        def launch(results: Sequence[Tensor | None], ordered: Tensor | None, measures: bool) -> None:
            take_step[(samples.count * pieces,)](
                *samples.arguments(), *results, numbers, table, None if index is None else index.contiguous(),
                None if key is None else key.contiguous(), sums, ordered, samples.size, pieces, sample_parts, step,
                len(coefficients), math.floor(rank),
                ORDER=tuple(sorted(range(n), key=lambda j: uncond is None or j != guided)),
                PRESENT=tuple(map(tuple, present)), GUIDED=guided, LIMIT=limit, MEASURES=measures,
                STEP_PER_SAMPLE=index is not None and index.dim() == 1, KEY_PER_SAMPLE=key is None or key.dim() == 2,
                PARTS=parts, MOST=PARTS_OF_SAMPLE, ALIGNED=samples.aligned, WIDE=wide, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip

        ordered = None
        if threshold is not None:
            magnitudes = input_0.new_empty((samples.count, samples.size), dtype=torch.float64 if wide else torch.float32)
            launch((magnitudes, None, None), None, True)
            ordered = magnitudes.sort(1).values
        launch(made, ordered, False)
    return outputs[0], outputs[1], outputs[2]


def guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: float) -> Tensor:
    """A step of one output, which is its guided input."""
    one = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    nothing = (None, None, None, None, None)
    return scheduler_step(cond, one, 0, cond.dtype, *nothing, *nothing, uncond, 0, scale, rescale, None, None, 1.0)[0]


def rows_of(rows: list[list[float]], n: int, learned: bool, limited: bool) -> list[list[float]]:
    """Of a step, with the derived value's share added to the outputs' factors where nothing limits it; and of a learned range the
    middle of the exponent and its slope."""
    rows = [list(row) for row in rows]
    outputs = rows[1 : len(rows) - learned]
    if not limited:
        for row in outputs:
            share, row[n] = row[n], 0.0
            for j, first in enumerate(rows[0]):
                if share != 0 and first != 0:
                    row[j] += share * first
    if not limited or not any(row[n] for row in outputs):
        rows[0] = [0.0] * (n + 2)
    rows[0][n] = 0.0
    if learned:
        low, high = rows[-1][:2]
        rows[-1][:2] = (low + high) / 4, (high - low) / 4
    return rows


def sums_of(samples: Samples, guided: int, numbers: tuple[float, ...], parts: int, wide: bool) -> tuple[Tensor, int]:
    """The sums of a rescaled guidance, (samples, parts of a sample, 4), and how many parts: by the sample's size alone."""
    cond, uncond = (samples.tensors[i] for i in (guided, 5))
    assert cond is not None and uncond is not None
    blocks = triton.cdiv(samples.size, BLOCK)
    length = triton.cdiv(blocks, PARTS_OF_SAMPLE)
    sample_parts = triton.cdiv(blocks, length)
    sums = cond.new_empty((samples.count, sample_parts, 4), dtype=torch.float64)
    add_up[(samples.count * sample_parts,)](
        cond, samples.strides[guided], uncond, samples.strides[5], sums, numbers, samples.size, sample_parts, length,
        PARTS=parts, ALIGNED=samples.aligned, WIDE=wide, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return sums, sample_parts
