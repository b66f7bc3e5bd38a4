"""residual_quantize's backward on NVIDIA GPUs: x walks through the levels again, rounded as in the forward. Gradients are
computed in fp64 and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.vq.triton_kernels.codebook import OPTIONS, block_of, fp64_bits, fp64_of, narrowed, on
from mmgen_kernels.vq.triton_kernels.prepare import to_wide, widen
from mmgen_kernels.vq.triton_kernels.residual_sums import book_of, codebooks_of, slope_of, sum_levels

ROWS = tl.constexpr(8)  # that a program walks through all levels


@triton.jit
def has_code(indices, n, inside, L, LEVELS: tl.constexpr):
    """(ROWS,): does the row take part in any level?"""
    level = tl.arange(0, LEVELS)[None, :]
    return tl.max(tl.load(indices + n[:, None] * L + level, mask=inside[:, None] & (level < L), other=-1), 1) >= 0


@triton.jit(do_not_specialize=["N", "L", "beta"])
def pull_back(
    x, x_n, x_d, codebook, codebook_l, codebook_first, codebook_k, codebook_d, first, indices, grad_loss, rows_of_level,
    upstream, upstream_n, upstream_d, out, total, beta, N, D, L,
    OF_QUANTIZED: tl.constexpr, ROTATE: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (N, D): beta times the slopes of the levels times the residuals they leave, and `upstream` of rows that have a code; NaN
    as a whole where the forward's row is. With ROTATE total (N, D), the sum of the codes, in place of `upstream`."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    j = tl.arange(0, LEVELS)
    d = tl.arange(0, BLOCK_D)
    squared = tl.zeros((ROWS, LEVELS), tl.float64)
    for begin in range(0, D, BLOCK_D):
        at = (begin + d)[None, :].to(tl.int64)
        here = inside[:, None] & (at < D)
        r = to_wide(tl.load(x + n[:, None] * x_n + at * x_d, mask=here, other=0.0), WIDE)
        pull = tl.zeros((ROWS, BLOCK_D), tl.float64)
        codes = tl.zeros_like(r)
        for level in range(0, L):
            book, num_codes = book_of(codebook, codebook_l, codebook_first, first, level)
            code = tl.minimum(tl.load(indices + n * L + level, mask=inside, other=-1), num_codes - 1)
            read = (code >= 0)[:, None] & (at < D)
            c = to_wide(tl.load(book + code[:, None] * codebook_k + at * codebook_d, mask=read, other=0.0), WIDE)
            r = r - c
            rest = tl.where(read, widen(r), 0.0)
            squared += tl.where(j[None, :] == level, tl.sum(rest * rest, 1)[:, None], 0.0)
            pull += fp64_of(beta) * slope_of(grad_loss, rows_of_level, level, D) * rest
            if ROTATE:
                codes += c
        if ROTATE:
            tl.store(total + n[:, None] * D + at, codes, mask=here)
        elif OF_QUANTIZED:
            read = here & has_code(indices, n, inside, L, LEVELS)[:, None]
            pull += widen(tl.load(upstream + n[:, None] * upstream_n + at * upstream_d, mask=read, other=0.0))
        tl.store(out + n[:, None] * D + at, narrowed(pull, out), mask=here)
    spoilt = tl.max((squared < float("inf")).to(tl.int32) ^ 1, 1) != 0  # also by NaN
    if tl.max(spoilt.to(tl.int32), 0) != 0:
        tl.debug_barrier()  # the numbers that NaN replaces are written
        for begin in range(0, D, BLOCK_D):
            at = (begin + d)[None, :].to(tl.int64)
            nan = tl.full((ROWS, BLOCK_D), float("nan"), tl.float64)
            tl.store(out + n[:, None] * D + at, narrowed(nan, out), mask=(inside & spoilt)[:, None] & (at < D))


@triton.jit(do_not_specialize=["N", "L"])
def add_rotated(
    x, x_n, x_d, total, pull, upstream, upstream_n, upstream_d, indices, out, N, D, L, LEVELS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out (N, D) = pull (N, D) + s R^T upstream, of rows that have a code, with the s and R of `rotate_to` (reference/lookup.py)
    that turn x into total (N, D); where they do not exist, pull + upstream."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    active = has_code(indices, n, n < N, L, LEVELS)
    d = tl.arange(0, BLOCK_D)
    of_x, of_c = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for begin in range(0, D, BLOCK_D):
        at = (begin + d)[None, :].to(tl.int64)
        read = active[:, None] & (at < D)
        row = widen(tl.load(x + n[:, None] * x_n + at * x_d, mask=read, other=0.0))
        c = widen(tl.load(total + n[:, None] * D + at, mask=read, other=0.0))
        of_x += tl.sum(row * row, 1)
        of_c += tl.sum(c * c, 1)
    exists = (of_x > 0) & (of_c > 0)
    of_x, of_c = tl.sqrt(tl.where(exists, of_x, 1.0)), tl.sqrt(tl.where(exists, of_c, 1.0))
    of_r, r_dot_g, q_dot_g = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for begin in range(0, D, BLOCK_D):
        at = (begin + d)[None, :].to(tl.int64)
        read = active[:, None] & (at < D)
        e = widen(tl.load(x + n[:, None] * x_n + at * x_d, mask=read, other=0.0)) / of_x[:, None]
        q = widen(tl.load(total + n[:, None] * D + at, mask=read, other=0.0)) / of_c[:, None]
        g = widen(tl.load(upstream + n[:, None] * upstream_n + at * upstream_d, mask=read, other=0.0))
        of_r += tl.sum((e + q) * (e + q), 1)
        r_dot_g += tl.sum((e + q) * g, 1)
        q_dot_g += tl.sum(q * g, 1)
    exists = exists & (of_r > 0)
    along_r = r_dot_g / tl.where(exists, of_r, 1.0)
    for begin in range(0, D, BLOCK_D):
        at = (begin + d)[None, :].to(tl.int64)
        here = (n < N)[:, None] & (at < D)
        read = active[:, None] & (at < D)
        e = widen(tl.load(x + n[:, None] * x_n + at * x_d, mask=read, other=0.0)) / of_x[:, None]
        q = widen(tl.load(total + n[:, None] * D + at, mask=read, other=0.0)) / of_c[:, None]
        g = widen(tl.load(upstream + n[:, None] * upstream_n + at * upstream_d, mask=read, other=0.0))
        turned = (of_c / of_x)[:, None] * (g - 2 * (e + q) * along_r[:, None] + 2 * e * q_dot_g[:, None])
        g = tl.where(exists[:, None], turned, g)
        own = tl.load(pull + n[:, None] * D + at, mask=here, other=0.0)
        tl.store(out + n[:, None] * D + at, narrowed(own + g, out), mask=here)


def residual_quantize_backward(
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    sizes: list[int],
    beta: float,
    gradient: str,
    need_grad_x: bool,
    need_grad_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    """Launcher of the operator. Only losses have a gradient to the codebooks: else it is 0, and NaN of a code whose row is NaN."""
    D, L = x.shape[-1], indices.shape[-1]
    rows, found = x.reshape(x.numel() // D, D), indices.reshape(x.numel() // D, L).contiguous()
    wide = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    grad_x, grad_codebooks = x.new_empty(0), codebooks.new_empty(0)
    with on(x):
        books = codebooks_of(codebooks, sizes)
        of_loss = torch.zeros(L, dtype=wide, device=x.device) if grad_loss is None else grad_loss.contiguous()
        rows_of_level = (found >= 0).sum(0)  # (L,)
        if need_grad_x:
            grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            if len(rows) > 0:
                upstream = None if grad_quantized is None else grad_quantized.reshape(len(rows), D)
                rotate = upstream is not None and gradient == "rotation"
                g = (upstream, *((0, 0) if upstream is None else upstream.stride()))
                total = torch.empty(rows.shape, dtype=wide, device=x.device) if rotate else None
                pull = torch.empty(rows.shape, dtype=torch.float64, device=x.device) if rotate else grad_x
                sized = {"LEVELS": max(2, triton.next_power_of_2(L)), "BLOCK_D": block_of(D), **OPTIONS}
                blocks = triton.cdiv(len(rows), ROWS.value)
                pull_back[blocks,](
                    rows, *rows.stride(), books.tensor, *books.strides, books.first, found, of_loss, rows_of_level,
                    *g, pull, total, fp64_bits(beta), len(rows), D, L,
                    OF_QUANTIZED=upstream is not None, ROTATE=rotate, WIDE=wide == torch.float64, **sized,
                )  # fmt: skip
                if rotate:
                    add_rotated[blocks,](rows, *rows.stride(), total, pull, *g, found, grad_x, len(rows), D, L, **sized)
        if need_grad_codebooks:
            grad_codebooks = torch.zeros(codebooks.shape, dtype=codebooks.dtype, device=x.device)
            if len(rows) > 0:
                sum_levels(rows, books, found, L, wide, grad_codebooks.view(-1, D), None, of_loss, rows_of_level)
    return grad_x, grad_codebooks
