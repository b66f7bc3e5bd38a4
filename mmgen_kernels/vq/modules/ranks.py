"""What a codebook that all ranks share asks of torch.distributed. With one process nothing happens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_dtype(kept: Tensor) -> torch.dtype:
    """fp64 where several ranks add their sums before these are rounded."""
    return torch.float64 if several_ranks() else kept.dtype


def added_over_ranks(values: Tensor) -> Tensor:
    if several_ranks():
        dist.all_reduce(values)
    return values


def gathered(values: Tensor, dim: int) -> Tensor:
    """All ranks' values, in the order of the ranks. They must have the same shape."""
    if not several_ranks():
        return values
    values = values.contiguous()
    if values.dtype == torch.bool:
        return gathered(values.byte(), dim).bool()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts, dim)
