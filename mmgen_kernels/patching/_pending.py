"""Stand-ins, in plain PyTorch, for public operators that the drop-in needs and the package does not offer yet."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes of `indices`: (K, D) and (...) -> (..., D), or (H, K, D) and (H, ...) -> (H, ..., D). Index -1 gives 0."""
    safe = indices.clamp(0, codebook.shape[-2] - 1)
    if codebook.dim() == 3:
        head = torch.arange(len(codebook), device=codebook.device).view(-1, *[1] * (indices.dim() - 1))
        codes = codebook[head, safe]
    else:
        codes = codebook[safe]
    return torch.where((indices >= 0).unsqueeze(-1), codes, 0)


def code_statistics(
    x: Tensor, indices: Tensor, num_codes: int, *, mask: Tensor | None = None, heads: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, int64 (K,) or (H, K), and their sums (K, D) or (H, K, D), in fp32 or better."""
    dim, count = x.shape[-1], len(x) if heads else 1
    dtype = dtype or torch.promote_types(x.dtype, torch.float32)
    valid = indices >= 0 if mask is None else (indices >= 0) & mask
    offsets = num_codes * torch.arange(count, device=x.device)[:, None]
    slots = (indices.clamp(0, num_codes - 1).reshape(count, -1) + offsets).view(-1)
    slots = torch.where(valid.reshape(-1), slots, count * num_codes)
    counts = torch.zeros(count * num_codes + 1, dtype=torch.int64, device=x.device).index_add_(0, slots, torch.ones_like(slots))
    order = slots.sort(stable=True).indices
    sums = torch.segment_reduce(x.detach().to(dtype).reshape(-1, dim)[order], "sum", lengths=counts, axis=0)
    counts, sums = counts[:-1], sums[:-1]
    return (counts.view(count, -1), sums.view(count, num_codes, dim)) if heads else (counts, sums)
