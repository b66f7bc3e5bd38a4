"""What trains a codebook, in plain PyTorch: codes of indices, sums by code, their moving averages, dead codes.

Shapes: codebook (K, D) with indices (...), or (H, K, D) with (H, ...). An index below 0 stands for no code, one past the end for
the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.philox.reference import philox_integers

NO_ROW = 1 << 32  # above every 32-bit integer


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    codes = codebook if codebook.dim() == 3 else codebook[None]  # (H, K, D)
    per_head = indices.reshape(len(codes), indices.numel() // max(1, len(codes)), 1)  # (H, N, 1)
    places = per_head.clamp(0, codes.shape[1] - 1).expand(-1, -1, codes.shape[2])
    return torch.where(per_head >= 0, codes.gather(1, places), 0).view(*indices.shape, codebook.shape[-1])


def gather_codes_backward(grad_codes: Tensor | None, indices: Tensor, codebook_shape: list[int]) -> Tensor:
    if grad_codes is None:
        return torch.zeros(codebook_shape, device=indices.device)
    heads = len(codebook_shape) == 3
    return code_statistics(grad_codes, indices, None, codebook_shape[-2], heads, torch.float64)[0].to(grad_codes.dtype)


def code_statistics(
    x: Tensor, indices: Tensor, mask: Tensor | None, num_codes: int, heads: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A stable sort by code, then sums in row order in fp64: the same bits in every run, which scatter_add_ does not promise."""
    H = len(x) if heads else 1
    lead = (H,) if heads else ()
    present = indices >= 0 if mask is None else (indices >= 0) & mask
    per_head = indices.clamp(max=num_codes - 1).reshape(H, indices.numel() // max(1, H))  # (H, N)
    slots = per_head + num_codes * torch.arange(H, device=x.device)[:, None]
    slots = torch.where(present.reshape(slots.shape), slots, H * num_codes).view(-1)  # (H N,), the last for rows without a code
    ordered, order = slots.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(H * num_codes + 1, device=x.device), right=True)  # (H K + 1,)
    counts = ends.diff(prepend=ends.new_zeros(1))
    rows = x.reshape(-1, x.shape[-1])[order].double()  # (H N, D)
    if len(rows):
        # unsafe: the lengths are right by construction, and to check them torch would wait for the GPU
        sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True)
    else:
        sums = rows.new_zeros(len(counts), x.shape[-1])
    return sums[:-1].to(dtype).view(*lead, num_codes, x.shape[-1]), counts[:-1].view(*lead, num_codes)


def code_statistics_backward(grad_sums: Tensor | None, x: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    if grad_sums is None:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    rows = gather_codes(grad_sums, indices if mask is None else indices.masked_fill(~mask, -1))
    return rows.to(x.dtype)


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
    size = decay * cluster_size.double() + (1 - decay) * counts.double()  # (..., K)
    total = decay * code_sum.double() + (1 - decay) * sums.double()  # (..., K, D)
    cluster_size.copy_(size)
    code_sum.copy_(total)
    size, total = cluster_size.double(), code_sum.double()  # as they are kept: what a later step starts from
    everything = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (everything + size.shape[-1] * eps) * everything
    codes = total / smoothed[..., None]
    if normalize:
        codes = codes / codes.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    codebook.copy_(codes)


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
    codes = codebook.view(-1, *codebook.shape[-2:])  # (H, K, D)
    H, K, D = codes.shape
    rows = x.reshape(H, x[..., 0].numel() // max(1, H), D)  # (H, N, D)
    dead = (cluster_size.double() < threshold).view(H, K)  # in fp32 the threshold would be rounded first
    order, valid = random_order(rows.shape[:2], mask, key)  # (H, N), (H, 1)
    rank = dead.cumsum(-1) - 1  # of a dead code among the dead ones
    taken = dead & (rank < valid)
    if rows.shape[1] == 0:
        return
    source = order.gather(1, rank.clamp(0, rows.shape[1] - 1))  # (H, K)
    fresh = rows.gather(1, source[..., None].expand(-1, -1, D)).double()  # (H, K, D)
    if normalize:
        fresh = fresh / fresh.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    taken, fresh = taken.view(cluster_size.shape), fresh.view(codebook.shape).to(codebook.dtype)
    codebook.copy_(torch.where(taken[..., None], fresh, codebook))  # and its sum from what the codebook holds of it
    code_sum.copy_(torch.where(taken[..., None], fresh.double() * reset, code_sum.double()))
    cluster_size.copy_(torch.where(taken, reset, cluster_size.double()))


def random_order(shape: tuple[int, ...], mask: Tensor | None, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (H, N) of each head in the order of their random integers, valid ones first, and how many are valid (H, 1)."""
    draws = philox_integers(key, list(shape))
    if mask is not None:
        draws = torch.where(mask.reshape(shape), draws, NO_ROW)
    return draws.argsort(dim=-1, stable=True), (draws < NO_ROW).sum(-1, keepdim=True)
