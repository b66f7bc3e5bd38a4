"""What trains a codebook, on NVIDIA GPUs: codes of indices, sums by code, moving averages.

Sums in fp64 and in an order that the rows alone decide: rows sorted by code, runs of equal codes added within chunks, then the
parts of runs that cross chunks. No atomics, nothing is looked at on the host.
"""

from __future__ import annotations

import contextlib
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.vq.triton_kernels.prepare import widen

ROWS = tl.constexpr(32)  # that a program holds; of a chunk
CODES = tl.constexpr(16)
PART = tl.constexpr(1024)  # of cluster sizes, added by one program
# Without a limit of its own ptxas keeps to 128 registers for sm_80, and spills two of average_codes.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4, "maxnreg": 240}


@triton.jit
def narrowed(values, like):
    """fp64 values as they are stored at `like`: half precision by way of fp32, as everywhere."""
    if like.dtype.element_ty == tl.float64:
        return values
    return values.to(tl.float32).to(like.dtype.element_ty)


@triton.jit
def fp64_of(bits):
    """The number that `fp64_bits` hands over."""
    return (tl.zeros((), tl.int64) + bits).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["N", "K", "T", "codes_h"])
def gather_rows(
    codes, codes_h, codes_k, codes_d, indices, mask, out, N, T, K, D, HAS_MASK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out (T, D): row i takes the code of index i of its head, which has N rows; 0 for an index below 0."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < T
    index = tl.load(indices + i, mask=inside, other=-1)
    if HAS_MASK:
        index = tl.where(tl.load(mask + i, mask=inside, other=0) != 0, index, -1)
    h, k = i // N, tl.minimum(index, K - 1)
    d = tl.arange(0, BLOCK_D)
    for start in range(0, D, BLOCK_D):
        at = start + d
        read = (inside & (index >= 0))[:, None] & (at < D)[None, :]
        c = tl.load(codes + (h * codes_h + k * codes_k)[:, None] + at[None, :].to(tl.int64) * codes_d, mask=read, other=0.0)
        tl.store(out + i[:, None] * D + at[None, :], narrowed(widen(c), out), mask=inside[:, None] & (at < D)[None, :])


@triton.jit
def add_within_run(value, begins, next_value, next_begins):
    return tl.where(next_begins != 0, next_value, value + next_value), begins | next_begins


@triton.jit
def slots_of_chunk(slots, first, T, S):
    """Of the ROWS sorted rows from `first` on: their slots, those of the rows before and after them in this chunk, or -1, and
    which count anywhere."""
    at = first + tl.arange(0, ROWS)
    inside = at < T
    slot = tl.load(slots + at, mask=inside, other=S)
    before = tl.load(slots + at - 1, mask=inside & (at > first), other=-1)
    after = tl.load(slots + at + 1, mask=(at + 1 < T) & (at + 1 < first + ROWS), other=-1)
    return slot, before, after, inside & (slot < S)


@triton.jit
def store_runs(values, slot, before, after, counts, first, starts, sums, partials, d, D):
    """Sums of runs of equal slots within a chunk, of values (ROWS, BLOCK_D) in fp64, components d. A run that lies within the chunk
    is done; one that goes on leaves partials (chunks, 2, D): [0] began before the chunk, [1] began in it."""
    begins = tl.broadcast_to((slot != before)[:, None], values.shape).to(tl.int32)
    totals, _ = tl.associative_scan((values, begins), 0, add_within_run)
    ends = counts & (slot != after)
    begin = tl.load(starts + slot, mask=counts, other=0)
    end = tl.load(starts + slot + 1, mask=counts, other=0)
    whole = (begin >= first) & (end <= first + ROWS)
    tl.store(sums + slot[:, None] * D + d[None, :], narrowed(totals, sums), mask=(ends & whole)[:, None] & (d < D)[None, :])
    part = first // ROWS * 2 + (begin >= first).to(tl.int64)
    tl.store(partials + part[:, None] * D + d[None, :], totals, mask=(ends & ~whole)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "T", "S", "x_h"])
def sum_runs(x, x_h, x_n, x_d, order, slots, starts, sums, partials, N, T, S, D, BLOCK_D: tl.constexpr):
    """Sums over the rows of each slot, as far as one chunk of ROWS sorted rows knows them."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    slot, before, after, counts = slots_of_chunk(slots, first, T, S)
    row = tl.load(order + first + tl.arange(0, ROWS), mask=counts, other=0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    places = ((row // N) * x_h + (row % N) * x_n)[:, None] + d[None, :].to(tl.int64) * x_d
    values = widen(tl.load(x + places, mask=counts[:, None] & (d < D)[None, :], other=0.0))
    store_runs(values, slot, before, after, counts, first, starts, sums, partials, d, D)


@triton.jit
def join_runs(starts, sums, partials, D, BLOCK_D: tl.constexpr):
    """The sums that `sum_runs` left open: of slots without rows, and of runs over several chunks, whose parts are added in
    order."""
    slot = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + slot)
    end = tl.load(starts + slot + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = begin // ROWS, (end - 1) // ROWS
    if (begin == end) | (first < last):
        total = tl.zeros((BLOCK_D,), tl.float64)
        if begin < end:
            total = tl.load(partials + (first * 2 + 1) * D + d, mask=d < D, other=0.0)
            for chunk in range(first + 1, last + 1):
                total += tl.load(partials + chunk * 2 * D + d, mask=d < D, other=0.0)
        tl.store(sums + slot * D + d, narrowed(total, sums), mask=d < D)


@triton.jit(do_not_specialize=["decay_bits", "K", "parts"])
def average_sizes(cluster_size, counts, part_sums, decay_bits, K, parts):
    """cluster_size (H, K) in place, and part_sums (H, parts) of it as it is kept."""
    decay = fp64_of(decay_bits)
    part = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    k = part * PART + tl.arange(0, PART)
    inside = k < K
    size = widen(tl.load(cluster_size + h * K + k, mask=inside, other=0.0))
    size = decay * size + (1 - decay) * tl.load(counts + h * K + k, mask=inside, other=0).to(tl.float64)
    kept = narrowed(size, cluster_size)
    tl.store(cluster_size + h * K + k, kept, mask=inside)
    tl.store(part_sums + h * parts + part, tl.sum(tl.where(inside, widen(kept), 0.0), 0))


@triton.jit(do_not_specialize=["decay_bits", "eps_bits", "K", "parts", "sums_h"])
def average_codes(
    codebook, cluster_size, code_sum, sums, sums_h, sums_k, sums_d, part_sums,
    decay_bits, eps_bits, K, parts, D,
    NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """code_sum (H, K, D) and codebook (H, K, D) in place."""
    decay = fp64_of(decay_bits)
    eps = fp64_of(eps_bits)
    h = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * CODES + tl.arange(0, CODES)
    inside = k < K
    d = tl.arange(0, BLOCK_D)
    everything = tl.zeros((), tl.float64)
    for part in range(0, parts):
        everything += tl.load(part_sums + h * parts + part)
    size = widen(tl.load(cluster_size + h * K + k, mask=inside, other=1.0))
    smoothed = (size + eps) / (everything + K * eps) * everything
    squared = tl.zeros((CODES,), tl.float64)
    for start in range(0, D, BLOCK_D):
        at = start + d
        read = inside[:, None] & (at < D)[None, :]
        places = (h * K + k)[:, None] * D + at[None, :]
        fresh = tl.load(sums + (h * sums_h + k * sums_k)[:, None] + at[None, :].to(tl.int64) * sums_d, mask=read, other=0.0)
        total = decay * widen(tl.load(code_sum + places, mask=read, other=0.0)) + (1 - decay) * widen(fresh)
        kept = narrowed(total, code_sum)
        tl.store(code_sum + places, kept, mask=read)
        code = widen(kept) / smoothed[:, None]
        squared += tl.sum(tl.where(read, code * code, 0.0), 1)
        if not NORMALIZE:
            tl.store(codebook + places, narrowed(code, codebook), mask=read)
    if NORMALIZE:
        length = tl.maximum(tl.sqrt(squared), 1e-12)
        for start in range(0, D, BLOCK_D):
            at = start + d
            read = inside[:, None] & (at < D)[None, :]
            places = (h * K + k)[:, None] * D + at[None, :]
            code = widen(tl.load(code_sum + places, mask=read, other=0.0)) / smoothed[:, None] / length[:, None]
            tl.store(codebook + places, narrowed(code, codebook), mask=read)


# -- launchers --------------------------------------------------------------------------------------------------------


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def block_of(D: int) -> int:
    return min(64, max(16, triton.next_power_of_2(D)))


def fp64_bits(value: float) -> int:
    """A Python float would reach a kernel as fp32."""
    return struct.unpack("q", struct.pack("d", value))[0]


def gather(codes: Tensor, indices: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    books = codes if codes.dim() == 3 else codes[None]  # (H, K, D)
    H, K, D = books.shape
    out = torch.empty(*indices.shape, D, dtype=dtype, device=codes.device)
    if out.numel() > 0:
        total = indices.numel()
        valid = None if mask is None else mask.contiguous().view(torch.uint8)
        with on(codes):
            gather_rows[(triton.cdiv(total, ROWS.value),)](
                books, *books.stride(), indices.contiguous(), valid, out, total // H, total, K, D,
                HAS_MASK=mask is not None, BLOCK_D=block_of(D), **OPTIONS,
            )  # fmt: skip
    return out


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    return gather(codebook, indices, None, codebook.dtype)


def gather_codes_backward(grad_codes: Tensor | None, indices: Tensor, codebook_shape: list[int]) -> Tensor:
    if grad_codes is None:
        return torch.zeros(codebook_shape, device=indices.device)
    return sum_by_code(grad_codes, indices, None, codebook_shape[-2], len(codebook_shape) == 3, grad_codes.dtype)[0]


def code_statistics(
    x: Tensor, indices: Tensor, mask: Tensor | None, num_codes: int, heads: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return sum_by_code(x, indices, mask, num_codes, heads, dtype)


def sum_by_code(
    x: Tensor, indices: Tensor, mask: Tensor | None, num_codes: int, heads: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    H, D = len(x) if heads else 1, x.shape[-1]
    rows = x.reshape(H, indices.numel() // max(1, H), D)  # (H, N, D)
    count, total, slots_end = rows.shape[1], indices.numel(), H * num_codes
    present = indices >= 0 if mask is None else (indices >= 0) & mask
    slots = indices.clamp(max=num_codes - 1).reshape(H, count) + num_codes * torch.arange(H, device=x.device)[:, None]
    slots = torch.where(present.reshape(H, count), slots, slots_end).view(-1)  # the last for rows without a code
    ordered, order = slots.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(slots_end + 1, device=x.device))  # (H K + 1,)
    lead = (H, num_codes) if heads else (num_codes,)
    sums = torch.empty(*lead, D, dtype=dtype, device=x.device)
    chunks, block_d = triton.cdiv(total, ROWS.value), block_of(D)
    partials = torch.empty(max(1, chunks), 2, D, dtype=torch.float64, device=x.device)
    if slots_end > 0:
        with on(x):
            if total > 0:
                sum_runs[chunks, triton.cdiv(D, block_d)](
                    rows, *rows.stride(), order, ordered, starts, sums, partials, count, total, slots_end, D,
                    BLOCK_D=block_d, **OPTIONS,
                )  # fmt: skip
            join_runs[slots_end, triton.cdiv(D, block_d)](starts, sums, partials, D, BLOCK_D=block_d, **OPTIONS)
    return sums, starts.diff().view(lead)


def code_statistics_backward(grad_sums: Tensor | None, x: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    if grad_sums is None:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return gather(grad_sums, indices, mask, x.dtype)


def update_codebook_ema_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> None:
    K, D = codebook.shape[-2:]
    H = cluster_size.numel() // max(1, K)
    if codebook.numel() == 0:
        return
    parts = triton.cdiv(K, PART.value)
    part_sums = torch.empty(H, parts, dtype=torch.float64, device=codebook.device)
    added = sums.view(H, K, D) if sums.dim() == 3 else sums[None]
    with on(codebook):
        average_sizes[parts, H](cluster_size, counts.contiguous(), part_sums, fp64_bits(decay), K, parts, **OPTIONS)
        average_codes[triton.cdiv(K, CODES.value), H](
            codebook, cluster_size, code_sum, added, *added.stride(), part_sums, fp64_bits(decay), fp64_bits(eps), K, parts, D,
            NORMALIZE=normalize, BLOCK_D=block_of(D), **OPTIONS,
        )  # fmt: skip
