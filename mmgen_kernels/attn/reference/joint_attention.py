"""joint_attention in plain PyTorch: attention of all queries with the keys of both streams."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.attn.reference.attention import attention, attention_backward, wide_dtype


def joint_attention(
    q_1: Tensor,
    k_1: Tensor,
    v_1: Tensor,
    q_2: Tensor,
    k_2: Tensor,
    v_2: Tensor,
    key_lengths_1: Tensor | None,
    key_lengths_2: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    k, v, bias = joined(k_1, v_1, k_2, v_2, key_lengths_1, key_lengths_2)
    out, lse = attention(torch.cat((q_1, q_2), 1), k, v, bias, None, None, None, False, scale, True)
    out_1, out_2 = split(out, q_1, q_2)
    return out_1, out_2, lse


def joint_attention_backward(
    grad_out_1: Tensor | None,
    grad_out_2: Tensor | None,
    q_1: Tensor,
    k_1: Tensor,
    v_1: Tensor,
    q_2: Tensor,
    k_2: Tensor,
    v_2: Tensor,
    key_lengths_1: Tensor | None,
    key_lengths_2: Tensor | None,
    out_1: Tensor,
    out_2: Tensor,
    lse: Tensor,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    k, v, bias = joined(k_1, v_1, k_2, v_2, key_lengths_1, key_lengths_2)
    streams = ((grad_out_1, q_1), (grad_out_2, q_2))
    grad_out = torch.cat([torch.zeros_like(q) if grad is None else grad for grad, q in streams], 1)
    q, out = torch.cat((q_1, q_2), 1), torch.cat((out_1, out_2), 1)
    *grads, _ = attention_backward(
        grad_out, None, q, k, v, bias, None, None, None, out, lse, False, scale, True, True, True, True, False
    )
    pairs = ((q_1, q_2), (k_1, k_2), (v_1, v_2))
    of_streams = zip(*(split(grad, *pair) for grad, pair in zip(grads, pairs, strict=True)), strict=True)
    given = [grad for of_stream in of_streams for grad in of_stream]
    return tuple(grad if need else q.new_empty(0) for grad, need in zip(given, needs, strict=True))


def joined(
    k_1: Tensor, v_1: Tensor, k_2: Tensor, v_2: Tensor, key_lengths_1: Tensor | None, key_lengths_2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values one stream after the other, and the bias (B, 1, 1, S) that hides those beyond key_lengths, which are not
    read: they may be NaN."""
    k, v = torch.cat((k_1, k_2), 1), torch.cat((v_1, v_2), 1)
    if key_lengths_1 is None and key_lengths_2 is None:
        return k, v, None
    padding = []
    for keys, lengths in ((k_1, key_lengths_1), (k_2, key_lengths_2)):
        at = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[:2])
        padding.append(at >= at.shape[1] if lengths is None else at >= lengths.unsqueeze(-1))
    hidden = torch.cat(padding, 1)  # (B, S)
    bias = torch.zeros(hidden.shape, dtype=wide_dtype(k), device=k.device).masked_fill(hidden, -torch.inf)
    hidden = hidden[:, :, None, None]
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), bias[:, None, None, :]


def split(tokens: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    return tokens.split((first.shape[1], second.shape[1]), 1)
