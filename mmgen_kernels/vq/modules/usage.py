"""How evenly the codes of a codebook are used."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CodeUsage(NamedTuple):
    """How evenly the codes are used. Tensors, so that asking does not wait for the device."""

    usage: Tensor  # () or (H,), share of the codes that some row chose
    perplexity: Tensor  # () or (H,), exp of the entropy of the codes' frequencies: 1 to K


def counts_of(indices: Tensor, num_codes: int, heads: bool) -> Tensor:
    """Rows of each code, (K,) or (H, K). Integers, so that the order in which a GPU adds does not matter."""
    per_head = indices.reshape(len(indices) if heads else 1, -1)
    slots = torch.where(per_head < 0, num_codes, per_head)  # (H, N); one more slot for rows without a code
    counts = torch.zeros(len(per_head), num_codes + 1, dtype=torch.int64, device=indices.device)
    counts = counts.scatter_add_(1, slots, torch.ones_like(slots))[:, :num_codes]
    return counts if heads else counts[0]


def usage_of(counts: Tensor) -> CodeUsage:
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return CodeUsage((counts > 0).float().mean(-1), entropy.exp().float())
