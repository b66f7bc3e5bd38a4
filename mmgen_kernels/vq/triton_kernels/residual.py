"""residual_quantize on NVIDIA GPUs: the lookup of each level, and one kernel that takes the codes away from the residual."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.vq.reference.residual import codebook_per_level, levels_taken
from mmgen_kernels.vq.triton_kernels import residual_levels
from mmgen_kernels.vq.triton_kernels.nearest_code import MAX_HEADS, Configuration, chip, nearest_code, pack_codebooks
from mmgen_kernels.vq.triton_kernels.prepare import to_wide, widen
from mmgen_kernels.vq.triton_kernels.residual_sums import codebooks_of, sum_levels

ROWS = tl.constexpr(8)  # rows that a program holds at a time: 92 registers at D >= 64, where 16 rows take 185 and 32 spill
MERGED = tl.constexpr(64)  # partial sums added at a time
LAUNCH = {"enable_fp_fusion": False, "num_warps": 4}  # roundings count here


@triton.jit(do_not_specialize=["N", "L", "level"])
def advance(
    x, x_n, x_d, codebook, codebook_k, codebook_d, index, residual, total, indices, partial, N, D, L, level,
    FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """residual (N, D) = x - code, NaN as a whole where its squared norm is not finite; total (N, D) += code, or = code if FIRST;
    indices (N, L) of this level; partial (blocks, 2): squared norms added, and how many rows have a code.

    `residual` is another tensor than x, so that no thread writes what another has still to read.
    """
    block = tl.program_id(0).to(tl.int64)
    n = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = n < N
    code = tl.load(index + n, mask=inside, other=-1)
    active = code >= 0
    rows = x + n[:, None] * x_n
    codes = codebook + tl.where(active, code, 0)[:, None] * codebook_k
    squared = tl.zeros((ROWS,), tl.float64)
    for start in range(0, D, BLOCK_D):
        at = (start + d)[None, :].to(tl.int64)
        read = active[:, None] & (at < D)
        r = to_wide(tl.load(rows + at * x_d, mask=read, other=0.0), WIDE)
        c = to_wide(tl.load(codes + at * codebook_d, mask=read, other=0.0), WIDE)
        rest = widen(r - c)
        squared += tl.sum(rest * rest, 1)
    finite = squared < float("inf")  # false for NaN
    for start in range(0, D, BLOCK_D):
        at = (start + d)[None, :].to(tl.int64)
        read = inside[:, None] & (at < D)
        r = to_wide(tl.load(rows + at * x_d, mask=read, other=0.0), WIDE)
        c = to_wide(tl.load(codes + at * codebook_d, mask=read & active[:, None], other=0.0), WIDE)
        rest = tl.where(finite[:, None], r - c, float("nan"))
        tl.store(residual + n[:, None] * D + at, tl.where(active[:, None], rest, r), mask=read)
        sums = total + n[:, None] * D + at
        added = c
        if not FIRST:
            before = tl.load(sums, mask=read, other=0.0)
            added = tl.where(active[:, None], before + c, before)
        tl.store(sums, tl.where(finite[:, None], added, float("nan")), mask=read)
    tl.store(indices + n * L + level, code, mask=inside)
    tl.store(partial + block * 2, tl.sum(tl.where(finite, squared, float("nan")), 0))
    tl.store(partial + block * 2 + 1, tl.sum(active.to(tl.float64), 0))


@triton.jit(do_not_specialize=["blocks"])
def mean_squares(partial, means, blocks, D):
    """means (L,) of partial (L, blocks, 2), added in fixed order: the squared norms over rows and components; 0 without rows."""
    level = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MERGED)
    squares = tl.zeros((MERGED,), tl.float64)
    rows = tl.zeros((MERGED,), tl.float64)
    for start in range(0, blocks, MERGED):
        at = start + i.to(tl.int64)
        pairs = partial + (level * blocks + at) * 2
        squares += tl.load(pairs, mask=at < blocks, other=0.0)
        rows += tl.load(pairs + 1, mask=at < blocks, other=0.0)
    terms = tl.maximum(tl.sum(rows, 0), 1.0) * D
    tl.store(means + level, tl.sum(squares, 0) / terms)


MAX_ROW = 128  # components: while 64 rows of 256 are packed, in fp64, the kernel spills (54 times for sm_90, Triton 3.9)
ALIGNED = 16  # of which wider rows are a multiple: else a thread takes one number at a time and holds marks of 32 rows, not 8
# Codes times components. Without splitting a codebook, 64 rows are multiplied with it by one multiprocessor: 2^26 operations, 19 us
# at 60 % of a 132nd of 790 TFLOP/s, about what the eight launches that a level otherwise takes cost the host. Not measured.
MAX_CODEBOOK = 2**19


def in_one_launch(D: int, K: int, L: int, sizes: list[int], wide: torch.dtype) -> bool:
    """Does `residual_levels` serve it? Never a question of how many rows there are, as losses round otherwise there."""
    c = levels_configuration(D, (9, 0))
    return (
        wide == torch.float32  # an fp64 residual takes the registers twice
        and len(set(sizes)) <= 1  # tiles of all levels are counted alike
        and L <= MAX_HEADS
        and D <= MAX_ROW
        and (D <= ALIGNED or D % ALIGNED == 0)
        and K * c.d_pad <= MAX_CODEBOOK
        and triton.cdiv(K, c.block_k) <= residual_levels.TILES.value  # whose number is written into a score
    )


@functools.cache
def levels_configuration(D: int, capability: tuple[int, int]) -> Configuration:
    """64 rows fill the smallest warpgroup product of sm_90, and every program reads the codes once for all of its rows. Tiles of 64
    codes leave room in the registers for the two keys of each place."""
    d_pad = max(16, triton.next_power_of_2(D))
    return Configuration(d_pad, d_pad, 64, 64, 8, 2, capability >= (9, 0))


def levels_options(c: Configuration) -> dict[str, Any]:
    """Without a limit of its own ptxas keeps to 128 registers for narrow rows on sm_80, and spills 30 times."""
    limit = {"maxnreg": 240} if c.d_pad <= 32 else {}
    return {**c.options(), "enable_fp_fusion": False, **limit}


def all_levels(
    rows: Tensor, codebooks: Tensor, taken: Tensor | None, depth: int, metric: str, total: Tensor, indices: Tensor
) -> Tensor:
    """Fills total (N, D) and indices (N, L), and returns the means (L,) of squares. codebooks (L, K, D)."""
    L, K, D = codebooks.shape
    N, device = len(rows), rows.device
    shared = codebooks.stride(0) == 0
    books = (codebooks[:1] if shared else codebooks).contiguous()  # (H, K, D)
    rows = rows.contiguous()
    if rows.data_ptr() % 16 != 0:
        rows = rows.clone()
    if books.data_ptr() % 16 != 0:
        books = books.clone()
    c = levels_configuration(D, chip(device)[0])
    blocks = triton.cdiv(N, c.block_n)
    packed = pack_codebooks(books, metric, c)
    facts = torch.empty(len(books), residual_levels.FACTS.value, dtype=torch.float64, device=device)
    residuals = torch.empty(blocks * c.block_n, D, dtype=torch.float32, device=device)
    partial = torch.zeros(L, blocks, 2, dtype=torch.float64, device=device)
    means = torch.empty(L, dtype=torch.float64, device=device)
    residual_levels.summarise_levels[len(books),](
        packed.mean, packed.head, packed.part_largest, packed.chunk_bounds, facts, D, packed.parts, packed.chunk_bounds.shape[1],
        BLOCK_D=min(64, c.d_pad), **LAUNCH,
    )  # fmt: skip
    residual_levels.residual_levels[blocks,](
        rows, taken, books, packed.mean, facts, packed.tiles_of(c), packed.half_squares, residuals, total, indices, partial,
        N, K, packed.k_pad, D, L, min(depth, L), packed.tiles, blocks, 0 if shared else 1,
        METRIC=metric, HAS_TAKEN=taken is not None, DESCRIPTORS=packed.by_descriptor(c),
        D_PAD=c.d_pad, BLOCK_N=c.block_n, BLOCK_K=c.block_k, **levels_options(c),
    )  # fmt: skip
    mean_squares[L,](partial, means, blocks, D, **LAUNCH)
    return means


def level_by_level(rows: Tensor, books: list[Tensor], choose: Callable, total: Tensor, indices: Tensor) -> Tensor:
    """Fills total (N, D) and indices (N, L) by choose(level, residual), and returns the means (L,) of squares."""
    (N, D), L = rows.shape, indices.shape[1]
    blocks = triton.cdiv(N, ROWS.value)
    residuals = [torch.empty_like(total), torch.empty_like(total)]
    partial = torch.zeros(L, blocks, 2, dtype=torch.float64, device=rows.device)
    means = torch.empty(L, dtype=torch.float64, device=rows.device)
    options = {"WIDE": total.dtype == torch.float64, "BLOCK_D": max(16, min(64, triton.next_power_of_2(D))), **LAUNCH}
    residual = rows
    for level, book in enumerate(books):
        index, after = choose(level, residual), residuals[level % 2]
        advance[blocks,](
            residual, *residual.stride(), book, *book.stride(), index, after, total, indices, partial[level],
            N, D, L, level, FIRST=level == 0, **options,
        )  # fmt: skip
        residual = after
    mean_squares[L,](partial, means, blocks, D, **LAUNCH)
    return means


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    levels: Tensor | None,
    mask: Tensor | None,
    depth: int,
    beta: float,
    gradient: str,
    metric: str,
    precision: str,
    statistics: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of the operator."""
    books = codebook_per_level(codebooks, sizes)
    dtype = torch.promote_types(x.dtype, codebooks.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    D, L = x.shape[-1], len(books)
    rows = x.reshape(x.numel() // D, D)
    N = len(rows)
    everybody = levels is None and mask is None
    taken = None if everybody else levels_taken(x, levels, mask, depth).view(-1)
    total = torch.zeros(N, D, dtype=wide, device=x.device)
    indices = torch.full((N, L), -1, dtype=torch.int64, device=x.device)
    means = torch.zeros(L, dtype=torch.float64, device=x.device)
    shape = codebooks.shape if statistics is not None else (0,)
    counts = torch.zeros(shape[:-1] or (0,), dtype=torch.int64, device=x.device)
    sums = torch.zeros(shape, dtype=statistics or wide, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if N > 0 and in_one_launch(D, len(books[0]), L, sizes, wide):
            stacked = codebooks if codebooks.dim() == 3 else codebooks.view(L, -1, D)
            means = all_levels(rows, stacked, taken, depth, metric, total, indices)
        elif N > 0:

            def choose(level: int, residual: Tensor) -> Tensor:  # (N,)
                return nearest_code(residual, books[level], None if taken is None else taken > level, metric, precision)

            means = level_by_level(rows, books[:depth], choose, total, indices)
        if N > 0 and statistics is not None:
            sum_levels(rows, codebooks_of(codebooks, sizes), indices, depth, wide, sums.view(-1, D), counts.view(-1))
    return (
        total.to(dtype).view(x.shape),
        indices.view(*x.shape[:-1], L),
        (means + beta * means).to(wide),
        counts,
        sums,
    )
