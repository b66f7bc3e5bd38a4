"""Dead codes on NVIDIA GPUs: one launch draws an integer for every row and counts the dead codes, torch sorts the integers, and
one launch gives the j-th dead code the j-th row. Nothing is looked at on the host: how many are dead, only the last launch knows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.philox.triton_kernels import block_of as words_of_block
from mmgen_kernels.vq.triton_kernels.codebook import OPTIONS, block_of, fp64_bits, fp64_of, narrowed, on
from mmgen_kernels.vq.triton_kernels.prepare import widen

DRAWS = tl.constexpr(256)  # Philox blocks that a program draws, four rows each
# Of a program, and of a count. A program that holds a dead code adds up the counts before its own: with all of 2^18 codes dead
# these are 4096 programs and 8 KiB each on average, 34 MB from the second level of cache.
CODES = tl.constexpr(64)
COUNTS = tl.constexpr(256)  # added at a time
NO_ROW = tl.constexpr(1 << 32)  # above every 32-bit integer


@triton.jit
def dead_codes(cluster_size, block, H, K, parts, threshold):
    """(CODES,): which codes of a block are dead, and their places in cluster_size (H, K). There are none past the last block."""
    h, k = block // parts, block % parts * CODES + tl.arange(0, CODES)
    inside = k < tl.where(h < H, K, 0)
    size = widen(tl.load(cluster_size + h * K + k, mask=inside, other=0.0))
    return inside & (size < fp64_of(threshold)), h * K + k


@triton.jit(do_not_specialize=["T", "H", "K", "parts", "threshold"])
def draw_and_count(key, mask, draws, cluster_size, dead_counts, threshold, T, H, K, parts, HAS_MASK: tl.constexpr):
    """draws (T,), of the rows of all heads: each row's integer, or NO_ROW of one that is not valid. dead_counts (H, parts): the
    dead among CODES codes each. They have nothing to do with one another, and share a launch: a program takes a block of either."""
    program = tl.program_id(0).to(tl.int64)
    first = program * DRAWS
    a, b, c, d = words_of_block(tl.load(key), tl.load(key + 1) + first + tl.arange(0, DRAWS))
    values = tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.int64)
    i = first * 4 + tl.arange(0, 4 * DRAWS)
    if HAS_MASK:
        values = tl.where(tl.load(mask + i, mask=i < T, other=0) != 0, values, NO_ROW)
    tl.store(draws + i, values, mask=i < T)
    dead, _ = dead_codes(cluster_size, program, H, K, parts, threshold)
    tl.store(dead_counts + program, tl.sum(dead.to(tl.int32), 0), mask=program < H * parts)


@triton.jit(do_not_specialize=["N", "H", "K", "parts", "threshold", "reset", "x_h"])
def replace_dead(
    codebook, cluster_size, code_sum, x, x_h, x_n, x_d, draws, order, dead_counts, threshold, reset, N, H, K, parts, D,
    NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """codebook (H, K, D), cluster_size (H, K) and code_sum (H, K, D) in place, of the codes that are dead; draws and order (H, N)
    are sorted. A program writes nothing that another reads."""
    block = tl.program_id(0).to(tl.int64)
    h, part = block // parts, block % parts
    dead, place = dead_codes(cluster_size, block, H, K, parts, threshold)
    if tl.sum(dead.to(tl.int32), 0) > 0:
        earlier = tl.zeros((COUNTS,), tl.int64)
        for start in range(0, part, COUNTS):
            i = start + tl.arange(0, COUNTS)
            earlier += tl.load(dead_counts + h * parts + i, mask=i < part, other=0)
        rank = tl.sum(earlier, 0) + tl.cumsum(dead.to(tl.int32), 0) - 1  # among the dead codes of the head
        drawn = h * N + rank
        taken = dead & (rank < N)
        taken = taken & (tl.load(draws + drawn, mask=taken, other=NO_ROW) < NO_ROW)
        rows = x + h * x_h + tl.load(order + drawn, mask=taken, other=0) * x_n
        d = tl.arange(0, BLOCK_D)
        squared = tl.zeros((CODES,), tl.float64)
        if NORMALIZE:
            for start in range(0, D, BLOCK_D):
                at = (start + d)[None, :].to(tl.int64)
                row = widen(tl.load(rows[:, None] + at * x_d, mask=taken[:, None] & (at < D), other=0.0))
                squared += tl.sum(row * row, 1)
        length = tl.maximum(tl.sqrt(squared), 1e-12)
        for start in range(0, D, BLOCK_D):
            at = (start + d)[None, :].to(tl.int64)
            read = taken[:, None] & (at < D)
            row = widen(tl.load(rows[:, None] + at * x_d, mask=read, other=0.0))
            if NORMALIZE:
                row = row / length[:, None]
            code = narrowed(row, codebook)
            tl.store(codebook + place[:, None] * D + at, code, mask=read)
            tl.store(code_sum + place[:, None] * D + at, narrowed(widen(code) * fp64_of(reset), code_sum), mask=read)
        tl.store(cluster_size + place, narrowed(fp64_of(reset) + tl.zeros((CODES,), tl.float64), cluster_size), mask=taken)


def replace_dead_codes_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    x: Tensor,
    mask: Tensor | None,
    key: Tensor,
    threshold: float,
    reset: float,
    normalize: bool,
) -> None:
    """Launcher of the operator. The integers are sorted as int64: rows that are not valid come after all that 32 bits hold."""
    K, D = codebook.shape[-2:]
    H = cluster_size.numel() // max(1, K)
    rows = x.reshape(H, x[..., 0].numel() // max(1, H), D)  # (H, N, D)
    N, parts = rows.shape[1], triton.cdiv(K, CODES.value)
    if codebook.numel() == 0 or N == 0:
        return
    draws = torch.empty(H, N, dtype=torch.int64, device=x.device)
    dead_counts = torch.empty(H, parts, dtype=torch.int32, device=x.device)
    valid = None if mask is None else mask.contiguous().view(torch.uint8)
    limit, size = fp64_bits(threshold), fp64_bits(reset)
    with on(codebook):
        draw_and_count[max(triton.cdiv(H * N, 4 * DRAWS.value), H * parts),](
            key.contiguous(), valid, draws, cluster_size, dead_counts, limit, H * N, H, K, parts,
            HAS_MASK=mask is not None, **OPTIONS,
        )  # fmt: skip
        draws, order = draws.sort(dim=-1, stable=True)
        replace_dead[H * parts,](
            codebook, cluster_size, code_sum, rows, *rows.stride(), draws, order, dead_counts, limit, size, N, H, K, parts, D,
            NORMALIZE=normalize, BLOCK_D=min(32, block_of(D)), **OPTIONS,
        )  # fmt: skip
