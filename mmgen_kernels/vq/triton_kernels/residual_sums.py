"""Sums over the rows of each code at every level of residual_quantize: its statistics, and the gradient of its codebooks.

Eight levels at a time. One launch walks the rows through them; then the sort and the sums of `code_statistics`, once for all
eight. A row's residual at a level is computed again where it is added, in registers, from the residual at the first of the eight.
That reads, per group of G = 8 levels and in units of N D numbers: the residual once in the walk and G times in the sums, the codes
of rows G times in the walk and G (G - 1) / 2 times in the sums, for the gradient G (G + 1) / 2: per level 1.1 residuals and 4.5 or
5.5 codes, and each further group writes a residual. Level by level, where one kernel takes the codes away and another adds up, it
is three residuals and two codes read and two tensors written, by eight times the launches and sorts. Nothing of size N x L x D
exists: beside x there is the residual of one group, and that of the next.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.vq.triton_kernels.codebook import OPTIONS, ROWS, block_of, join_runs, slots_of_chunk, store_runs
from mmgen_kernels.vq.triton_kernels.prepare import to_wide, widen

GROUP = tl.constexpr(8)  # levels
WALKED = tl.constexpr(8)  # rows that a program walks through the levels
COLUMNS = 32  # of a tile of added rows: with 64 the gradient's kernel spills 54 times for sm_80 (Triton 3.9)


class Codebooks(NamedTuple):
    """Code k of level l is at l strides[0] + first_l strides[1] + k strides[2]; before level l there are first_l codes."""

    tensor: Tensor  # (L, K, D) or (sum of K_l, D)
    strides: tuple[int, ...]  # of l, first_l, k and d
    ends: list[int]  # first_0 = 0, first_1, .. first_L
    first: Tensor  # (L + 1,), the same on the device


def codebooks_of(codebooks: Tensor, sizes: list[int]) -> Codebooks:
    """`first` is made without a copy from the host, which a graph could not capture."""
    stacked = codebooks.dim() == 3
    sizes = [codebooks.shape[1]] * codebooks.shape[0] if stacked else sizes
    ends = [0, *itertools.accumulate(sizes)]
    if len(set(sizes)) == 1:
        first = torch.arange(0, ends[-1] + 1, sizes[0], device=codebooks.device)
    else:
        first = torch.empty(len(ends), dtype=torch.int64, device=codebooks.device)
        for place, end in zip(first, ends, strict=True):
            place.fill_(end)
    strides = codebooks.stride()
    return Codebooks(codebooks, (strides[0], 0, *strides[1:]) if stacked else (0, strides[0], *strides), ends, first)


@triton.jit
def book_of(codebook, codebook_l, codebook_first, first, level):
    """Where the codes of a level begin, and how many they are."""
    level = tl.zeros((), tl.int64) + level
    before = tl.load(first + level)
    return codebook + level * codebook_l + before * codebook_first, tl.load(first + level + 1) - before


@triton.jit
def slope_of(grad_loss, rows_of_level, level, D):
    """What the gradient of |residual|^2 / 2 of a row is multiplied with: 2 grad_loss / (rows of the level D), in fp64."""
    terms = tl.maximum(tl.load(rows_of_level + level), 1).to(tl.float64) * D
    return widen(tl.load(grad_loss + level)) * (2.0 / terms)


@triton.jit(do_not_specialize=["N", "L", "start", "end"])
def walk_levels(
    x, x_n, x_d, codebook, codebook_l, codebook_first, codebook_k, codebook_d, first, indices, residual, sound, slots,
    N, D, L, start, end, KEEP: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From x, the residual at level `start`, to level `end`, at most GROUP further: slots (end - start, N) of the codes on the way,
    past the last one where there is none, and in sound (N,) the least level whose code leaves a squared norm that is not finite.
    With KEEP residual (N, D) at level `end`: what it holds of a row counts as NaN from the level after the row's in `sound` on."""
    n = tl.program_id(0).to(tl.int64) * WALKED + tl.arange(0, WALKED)
    inside = n < N
    j = tl.arange(0, GROUP)
    d = tl.arange(0, BLOCK_D)
    squared = tl.zeros((WALKED, GROUP), tl.float64)
    for begin in range(0, D, BLOCK_D):
        at = (begin + d)[None, :].to(tl.int64)
        r = to_wide(tl.load(x + n[:, None] * x_n + at * x_d, mask=inside[:, None] & (at < D), other=0.0), WIDE)
        for level in range(start, end):
            book, num_codes = book_of(codebook, codebook_l, codebook_first, first, level)
            code = tl.minimum(tl.load(indices + n * L + level, mask=inside, other=-1), num_codes - 1)
            read = (code >= 0)[:, None] & (at < D)
            r = r - to_wide(tl.load(book + code[:, None] * codebook_k + at * codebook_d, mask=read, other=0.0), WIDE)
            rest = tl.where(read, widen(r), 0.0)
            squared += tl.where(j[None, :] == level - start, tl.sum(rest * rest, 1)[:, None], 0.0)
        if KEEP:
            tl.store(residual + n[:, None] * D + at, r, mask=inside[:, None] & (at < D))
    finite = squared < float("inf")  # false for NaN
    least = tl.min(tl.where(finite, L, start + j[None, :]), 1)
    tl.store(sound + n, tl.minimum(tl.load(sound + n, mask=inside, other=0), least), mask=inside)

    at_level = inside[:, None] & (j < end - start)[None, :]
    levels = start + j.to(tl.int64)
    before = tl.load(first + levels, mask=levels < end, other=0)
    num_codes = tl.load(first + levels + 1, mask=levels < end, other=0) - before
    code = tl.load(indices + n[:, None] * L + levels[None, :], mask=at_level, other=-1)
    slot = tl.minimum(code, num_codes[None, :] - 1) + (before - tl.load(first + start))[None, :]
    slot = tl.where(code >= 0, slot, tl.load(first + end) - tl.load(first + start))
    tl.store(slots + j.to(tl.int64)[None, :] * N + n[:, None], slot, mask=at_level)


@triton.jit(do_not_specialize=["N", "T", "S", "L", "start"])
def sum_level_runs(
    x, x_n, x_d, codebook, codebook_l, codebook_first, codebook_k, codebook_d, first, indices, sound,
    grad_loss, rows_of_level, order, slots, starts, sums, partials, N, T, S, D, L, start,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`sum_runs` of codebook.py for several levels, of T = (levels) N rows together, with x the residual at level `start`. What is
    added is a row's residual at its level; with GRADIENT, what its code leaves of that, times minus the level's slope."""
    chunk = tl.program_id(0).to(tl.int64) * ROWS
    slot, before, after, counts = slots_of_chunk(slots, chunk, T, S)
    row = tl.load(order + chunk + tl.arange(0, ROWS), mask=counts, other=0)
    n, level = row % N, start + row // N
    until = tl.where(counts, level + 1 if GRADIENT else level, 0)  # codes of levels before this one are taken away
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = d[None, :].to(tl.int64)
    r = to_wide(tl.load(x + n[:, None] * x_n + at * x_d, mask=counts[:, None] & (at < D), other=0.0), WIDE)
    for earlier in range(start, tl.max(until, 0)):
        book, num_codes = book_of(codebook, codebook_l, codebook_first, first, earlier)
        code = tl.minimum(tl.load(indices + n * L + earlier, mask=earlier < until, other=-1), num_codes - 1)
        read = (code >= 0)[:, None] & (at < D)
        r = r - to_wide(tl.load(book + code[:, None] * codebook_k + at * codebook_d, mask=read, other=0.0), WIDE)
    spoilt = tl.load(sound + n, mask=counts, other=0) < until
    values = tl.where(spoilt[:, None], float("nan"), widen(r))
    if GRADIENT:
        values = 0.0 - slope_of(grad_loss, rows_of_level, level, D)[:, None] * values  # never -0, which no sum begins with
    store_runs(values, slot, before, after, counts, chunk, starts, sums, partials, d, D)


def sum_levels(
    rows: Tensor,
    books: Codebooks,
    indices: Tensor,
    depth: int,
    wide: torch.dtype,
    sums: Tensor,
    counts: Tensor | None = None,
    grad_loss: Tensor | None = None,
    rows_of_level: Tensor | None = None,
) -> None:
    """Fills sums (codes, D) and counts (codes,) of the first `depth` levels, whose codes come one level behind the other: of rows
    (N, D) as each level finds them, or, given grad_loss (L,) and rows_of_level (L,), how many rows have a code there, of their
    gradients to the codes. indices (N, L) contiguous."""
    (N, D), L = rows.shape, indices.shape[1]
    walked = {"WIDE": wide == torch.float64, "BLOCK_D": block_of(D), **OPTIONS}
    added = {**walked, "BLOCK_D": min(COLUMNS, block_of(D))}
    sound = torch.full((N,), L, dtype=torch.int64, device=rows.device)
    book = (books.tensor, *books.strides, books.first, indices)
    for start in range(0, depth, GROUP.value):
        end = min(start + GROUP.value, depth)
        total, slots_end = (end - start) * N, books.ends[end] - books.ends[start]
        after = torch.empty(N, D, dtype=wide, device=rows.device) if end < depth else None
        slots = torch.empty(total, dtype=torch.int64, device=rows.device)
        walk_levels[triton.cdiv(N, WALKED.value),](
            rows, *rows.stride(), *book, after, sound, slots, N, D, L, start, end, KEEP=end < depth, **walked
        )
        ordered, order = slots.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(slots_end + 1, device=rows.device))  # (slots_end + 1,)
        chunks = triton.cdiv(total, ROWS.value)
        partials = torch.empty(chunks, 2, D, dtype=torch.float64, device=rows.device)
        of_group = sums[books.ends[start] : books.ends[end]]
        sum_level_runs[chunks, triton.cdiv(D, added["BLOCK_D"])](
            rows, *rows.stride(), *book, sound, grad_loss, rows_of_level, order, ordered, starts, of_group, partials,
            N, total, slots_end, D, L, start, GRADIENT=grad_loss is not None, **added,
        )  # fmt: skip
        join_runs[slots_end, triton.cdiv(D, block_of(D))](starts, of_group, partials, D, BLOCK_D=block_of(D), **OPTIONS)
        if counts is not None:
            torch.sub(starts[1:], starts[:-1], out=counts[books.ends[start] : books.ends[end]])
        if after is not None:
            rows = after
