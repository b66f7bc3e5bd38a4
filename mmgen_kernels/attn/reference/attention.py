"""attention in plain PyTorch.

q is (B, T, H, D), k and v are (B, S, G, D) with G a divisor of H: head h reads keys of head h // (H / G). A packed batch is one
sample, B = 1, whose sequences `cu_seqlens_q` and `cu_seqlens_k` (C + 1,) bound. bias is (1 or B, 1 or H, 1 or T, 1 or S).

Everything is computed in fp32, in fp64 for fp64 q, and rounded once. The logits (B, H, T, S) are in memory here, and only here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    queries, keys, values = by_head(q, k, v, key_lengths)
    weights, lse = softmax(queries, keys, visible(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, causal), bias, scale)
    return (weights @ values).transpose(1, 2).to(q.dtype), lse.to(lse_dtype(q))


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    deterministic: bool,
    need_grad_q: bool,
    need_grad_k: bool,
    need_grad_v: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, keys, values = by_head(q, k, v, key_lengths)
    weights, _ = softmax(queries, keys, visible(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, causal), bias, scale)
    # (B, H, T, D) and (B, H, T)
    grad = torch.zeros_like(queries) if grad_out is None else grad_out.transpose(1, 2).to(queries.dtype)
    grad_weights = grad @ values.mT  # (B, H, T, S)
    # sum_s P dP is sum_d out dout, and the gradient of lse is P itself
    inner = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        inner = inner - grad_lse.unsqueeze(-1).to(inner.dtype)
    # a weight of 0 has gradient 0, whatever an infinite logit made of the rest
    grad_logits = torch.where(weights == 0, 0, weights * (grad_weights - inner))
    return (
        (scale * grad_logits @ keys).transpose(1, 2).to(q.dtype) if need_grad_q else q.new_empty(0),
        over_groups(grad_logits.mT @ (scale * queries), k) if need_grad_k else q.new_empty(0),
        over_groups(weights.mT @ grad, v) if need_grad_v else q.new_empty(0),
        grad_logits.sum_to_size(bias.shape).to(bias.dtype) if need_grad_bias and bias is not None else q.new_empty(0),
    )


def wide_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def lse_dtype(q: Tensor) -> torch.dtype:
    """Of the operator's second output. The backward's weights are exp(logit - lse): in fp32 the rounding of an lse of 6 would be
    four of their own. `attention` gives lse in fp32."""
    return torch.float64 if q.dtype in (torch.float64, torch.float32) else torch.float32


def by_head(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, T, D) and twice (B, H, S, D), wide. What lies beyond key_lengths is not read: it may be NaN."""
    wide, group = wide_dtype(q), q.shape[2] // k.shape[2]
    keys, values = (t.to(wide).transpose(1, 2) for t in (k, v))
    if key_lengths is not None:
        padding = (torch.arange(k.shape[1], device=k.device) >= key_lengths.unsqueeze(-1))[:, None, :, None]  # (B, 1, S, 1)
        keys, values = keys.masked_fill(padding, 0), values.masked_fill(padding, 0)
    return q.to(wide).transpose(1, 2), keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)


def over_groups(grad: Tensor, like: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, S, G, D)."""
    return grad.unflatten(1, (like.shape[2], -1)).sum(2).transpose(1, 2).to(like.dtype)


def softmax(queries: Tensor, keys: Tensor, seen: Tensor | None, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Weights (B, H, T, S) and the logarithm of their divisor (B, H, T): 0 and -inf where every key is masked."""
    logits = scale * queries @ keys.mT
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    blind = (lse == -torch.inf).unsqueeze(-1)
    return logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0), lse


def visible(
    q: Tensor,
    k: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
) -> Tensor | None:
    """Which query sees which key, (B or 1, 1, T, S); None: each sees all."""
    at_q, at_k = (torch.arange(t.shape[1], device=t.device) for t in (q, k))
    seen = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        (own_q, at_q), (own_k, at_k) = placed(at_q, cu_seqlens_q), placed(at_k, cu_seqlens_k)
        seen = (own_q[:, None] == own_k) & (own_q[:, None] >= 0)
    if causal:
        earlier = at_k <= at_q[:, None]
        seen = earlier if seen is None else seen & earlier
    if key_lengths is not None:
        within = (at_k < key_lengths[:, None])[:, None, None]
        seen = within if seen is None else seen & within
    return seen


def placed(at: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's sequence, -1 for none, and its place in that sequence."""
    bounds = cu_seqlens.to(at.dtype)
    own = torch.searchsorted(bounds, at, right=True) - 1  # empty sequences are passed over
    own = torch.where(own < len(bounds) - 1, own, -1)
    return own, at - bounds[own]
