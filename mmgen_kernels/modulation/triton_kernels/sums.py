"""Sums over tokens in an order that the tokens' own segment decides: chunks of a segment, then the chunks' partial sums.

A chunk never crosses a segment, the shortest run of tokens that share their vectors: the gradient of a vector is the sum over a
range of chunks, and how a sample is cut depends on T, never on the batch. With `rows` the tokens are taken in the order of a stable
sort by row, and each row starts a chunk; the table of chunks is made on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.modulation.triton_kernels.tiles import kind_of
from mmgen_kernels.triton_rounding import narrow

# Partial sums of three vectors are 6 / C activation passes of bf16 written and as much read, beside the six that a backward moves:
# 6 % at C = 32, half of which stays in L2. More tokens one after the other would lose digits: the error of an fp32 sum of C grows
# as sqrt(C / 2), that of a full tree over n as sqrt(log2 n), and partial sums are added in fp64. Hence also the shorter chunks of
# short segments, 1.26 times the error of a tree at most there and 1.41 times at T = 256.
CHUNK = 32
SHORT_CHUNK, SHORT_SEGMENT = 16, 128

# What one program of `sum_chunks` adds: chunks x columns. Of long ranges there are few, and the wide tile would leave a
# multiprocessor to read 512 chunks one after the other.
SHORT_TILE = (16, 256)
LONG_TILE = (64, 64)

# Left to itself ptxas keeps to 96 registers, which for sm_90 spills two where a table has its gradient too (Triton 3.9). With 128
# there are 4 programs to a multiprocessor, and 64 kB of reads on the way.
OPTIONS = {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": False}


class Chunks(NamedTuple):
    number: int  # of chunks; with rows a bound
    segment: int = 0  # tokens
    pieces: int = 1  # chunks of a segment
    length: int = 0  # tokens of a chunk
    order: Tensor | None = None  # (N,) tokens by row
    begins: Tensor | None = None  # (number,) of each chunk, in that order
    ends: Tensor | None = None
    first: Tensor | None = None  # (R + 1,) the first chunk of each row
    rows: int = 0  # R, the largest of the vectors'


def chunks_of(vectors: tuple[Tensor | None, ...], rows: Tensor | None, B: int, T: int, step: int) -> Chunks:
    """`step`: tokens that a program takes at a time."""
    if rows is not None:
        return chunks_by_row(rows.reshape(-1), max([len(v) for v in vectors if v is not None and v.dim() == 2], default=1))
    spans = [span_of(v, T) for v in vectors if v is not None and v.dim() > 1]
    segment = math.gcd(*(s for s in spans if s > 1)) or B * T
    pieces = triton.cdiv(segment, SHORT_CHUNK if segment <= SHORT_SEGMENT else CHUNK)
    length = triton.cdiv(triton.cdiv(segment, pieces), step) * step
    pieces = triton.cdiv(segment, length)
    return Chunks(B * T // segment * pieces, segment, pieces, length)


def span_of(vector: Tensor, T: int) -> int:
    """Tokens that share an element."""
    return T if vector.dim() == 2 else T // vector.shape[1]


def chunks_by_row(rows: Tensor, R: int) -> Chunks:
    N, device = len(rows), rows.device
    ordered, order = rows.clamp(0, R - 1).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(R + 1, dtype=rows.dtype, device=device))  # (R + 1,), the last is N
    first = torch.zeros(R + 1, dtype=torch.int64, device=device)
    torch.cumsum((starts.diff() + (CHUNK - 1)) // CHUNK, 0, out=first[1:])
    count = triton.cdiv(N, CHUNK) + min(R, N)
    chunk = torch.arange(count, device=device)
    row = torch.searchsorted(first, chunk, right=True) - 1  # R for chunks that are not there: they begin at or after N
    begins = starts[row] + (chunk - first[row]) * CHUNK
    ends = torch.minimum(begins + CHUNK, starts[(row + 1).clamp(max=R)])
    return Chunks(count, length=CHUNK, order=order, begins=begins, ends=ends, first=first, rows=R)


# -- the second launch ------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One gradient to be summed of partials."""

    slot: int  # which of the partial sums
    vector: int  # whose rows and chunks: 0 to 4, or -1 for the sum over all chunks
    by_row: bool
    tile: tuple[int, int]  # chunks x columns


@triton.jit
def add_range(partials, out, lo, hi, row, tile, D, SLOT: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """Row `row` of out: the chunks lo to hi, tile by tile, then a tree in registers."""
    d = tile * TILE[1] + tl.arange(0, TILE[1])
    total = tl.zeros([TILE[0], TILE[1]], tl.float64)
    for start in range(lo, hi, TILE[0]):
        chunk = start + tl.arange(0, TILE[0])
        at = (chunk * SLOTS + SLOT) * D
        mask = (chunk < hi)[:, None] & (d < D)[None, :]
        total += tl.load(partials + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float64)
    tl.store(out + row * D + d, narrow(tl.sum(total, 0), out), mask=d < D)


COUNTS = ("gate_count", "shift_count", "scale_count", "shift_2_count", "scale_2_count")
PARTS = ("gate_parts", "shift_parts", "scale_parts", "shift_2_parts", "scale_2_parts")


@triton.jit(do_not_specialize=["chunks", "last_row", *COUNTS, *PARTS])
def sum_chunks(
    partials, outs, first, chunks, last_row, D,
    gate_count, shift_count, scale_count, shift_2_count, scale_2_count,
    gate_parts, shift_parts, scale_parts, shift_2_parts, scale_2_parts,
    JOBS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (p, j) has a row and a tile of columns of job j. Of each vector: rows, and chunks to a row."""
    counts = (gate_count, shift_count, scale_count, shift_2_count, scale_2_count)
    parts = (gate_parts, shift_parts, scale_parts, shift_2_parts, scale_2_parts)
    program = tl.program_id(0).to(tl.int64)
    for j in tl.static_range(len(JOBS)):
        if tl.program_id(1) == j:
            SLOT: tl.constexpr = JOBS[j][0]
            VECTOR: tl.constexpr = JOBS[j][1]
            TILE: tl.constexpr = JOBS[j][3]
            tiles = (D + TILE[1] - 1) // TILE[1]
            row = program // tiles
            tile = program - row * tiles
            if VECTOR < 0:
                if row == 0:
                    lo = tl.zeros_like(program)
                    hi = lo + chunks
                    if first is not None:
                        hi = tl.load(first + last_row)  # those beyond are not there
                    add_range(partials, outs[j], lo, hi, row, tile, D, SLOT, SLOTS, TILE)
            else:
                if row < counts[VECTOR]:
                    if JOBS[j][2]:
                        lo = tl.load(first + row)
                        # rows beyond those of this vector are clamped to its last
                        hi = tl.load(first + tl.where(row == counts[VECTOR] - 1, last_row, row + 1))
                    else:
                        lo = row * parts[VECTOR]
                        hi = lo + parts[VECTOR]
                    add_range(partials, outs[j], lo, hi, row, tile, D, SLOT, SLOTS, TILE)


def sum_partials(
    partials: Tensor, chunks: Chunks, vectors: tuple[Tensor | None, ...], T: int, wanted: list[tuple[int, int, Tensor]]
) -> None:
    """wanted: slot, vector (-1: all chunks), and where the sum goes."""
    slots, D = partials.shape[1:]
    counts, parts, jobs, programs = [0] * 5, [0] * 5, [], 1
    by_row = chunks.first is not None
    for slot, vector, out in wanted:
        tile, count = LONG_TILE, 1
        of = vectors[vector]
        if vector >= 0 and of is not None:
            count = out.numel() // D
            counts[vector] = count
            if not by_row:
                parts[vector] = span_of(of, T) // chunks.segment * chunks.pieces
            if parts[vector] <= LONG_TILE[0]:
                tile = SHORT_TILE
        tile = (tile[0], min(tile[1], triton.next_power_of_2(D)))
        jobs.append(tuple(Job(slot, vector, by_row, tile)))
        programs = max(programs, count * triton.cdiv(D, tile[1]))
    sum_chunks[(programs, len(jobs))](
        partials, tuple(out for *_, out in wanted), chunks.first, chunks.number, chunks.rows, D, *counts, *parts,
        JOBS=tuple(jobs), SLOTS=slots, **OPTIONS,
    )  # fmt: skip


def owner(vector: Tensor | None, index: int, T: int, by_row: bool) -> int:
    """Whose rows the gradient of a vector has: its own, or -1 where all tokens share it."""
    return -1 if kind_of(vector, T, by_row) == "shared" else index
