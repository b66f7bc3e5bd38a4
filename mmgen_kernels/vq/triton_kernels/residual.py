"""residual_quantize on NVIDIA GPUs: the lookup of each level, and one kernel that takes the codes away from the residual."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.vq.reference.residual import codebook_per_level, levels_taken
from mmgen_kernels.vq.triton_kernels.codebook import code_statistics
from mmgen_kernels.vq.triton_kernels.nearest_code import nearest_code
from mmgen_kernels.vq.triton_kernels.prepare import widen

ROWS = tl.constexpr(8)  # rows that a program holds at a time: 92 registers at D >= 64, where 16 rows take 185 and 32 spill
MERGED = tl.constexpr(64)  # partial sums added at a time
LAUNCH = {"enable_fp_fusion": False, "num_warps": 4}  # roundings count here


@triton.jit
def to_wide(values, WIDE: tl.constexpr):
    return widen(values) if WIDE else values.to(tl.float32)


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
    """Launcher of the operator. The backward is the reference's: plain PyTorch that waits for nothing."""
    books = codebook_per_level(codebooks, sizes)
    dtype = torch.promote_types(x.dtype, codebooks.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    D, L = x.shape[-1], len(books)
    rows = x.reshape(x.numel() // D, D)
    N = len(rows)
    blocks = triton.cdiv(N, ROWS.value)
    everybody = levels is None and mask is None
    taken = None if everybody else levels_taken(x, levels, mask, depth).view(-1)
    total = torch.zeros(N, D, dtype=wide, device=x.device)
    residuals = [torch.empty_like(total), torch.empty_like(total)]
    indices = torch.full((N, L), -1, dtype=torch.int64, device=x.device)
    partial = torch.zeros(L, blocks, 2, dtype=torch.float64, device=x.device)
    means = torch.empty(L, dtype=torch.float64, device=x.device)
    shape = codebooks.shape if statistics is not None else (0,)
    counts = torch.zeros(shape[:-1] or (0,), dtype=torch.int64, device=x.device)
    sums = torch.zeros(shape, dtype=statistics or wide, device=x.device)
    options = {"WIDE": wide == torch.float64, "BLOCK_D": max(16, min(64, triton.next_power_of_2(D))), **LAUNCH}

    residual = rows
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for level in range(min(depth, L) if N else 0):
            book, after = books[level], residuals[level % 2]
            index = nearest_code(residual, book, None if taken is None else taken > level, metric, precision)  # (N,)
            if statistics is not None:
                sum_of_rows, count = code_statistics(residual, index, None, len(book), False, statistics)
                codebook_per_level(counts[..., None], sizes)[level].copy_(count[:, None])
                codebook_per_level(sums, sizes)[level].copy_(sum_of_rows)
            advance[blocks,](
                residual, *residual.stride(), book, *book.stride(), index, after, total, indices, partial[level],
                N, D, L, level, FIRST=level == 0, **options,
            )  # fmt: skip
            residual = after
        mean_squares[L,](partial, means, blocks, D, **LAUNCH)
    return (
        total.to(dtype).view(x.shape),
        indices.view(*x.shape[:-1], L),
        (means + beta * means).to(wide),
        counts,
        sums,
    )
