"""qk_norm_rope in plain PyTorch.

q is (B, T, H, D) and k (B, S, G, D). With across_heads a token is one row of H D channels (G D), else H rows of D; a weight and a
bias have a row's channels. cos and sin are (T, P) or (B, T, P), an angle for each of the P pairs that the first 2P channels of a
head make up: (2i, 2i + 1) if interleaved, else (i, i + P).

Everything is computed in fp32, in fp64 for fp64 q, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.attn.reference.attention import wide_dtype


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = rows_of(x, across_heads)
        if norm is not None:
            rows, _ = normalized(rows, norm, eps)
        if weight is not None:
            rows = rows * weight.to(rows.dtype)
        if bias is not None:
            rows = rows + bias.to(rows.dtype)
        return rotated(rows.view(x.shape), cos, sin, interleaved).to(x.dtype)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


def qk_norm_rope_backward(
    grad_rotated_q: Tensor | None,
    grad_rotated_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
    need_grad_q: bool,
    need_grad_k: bool,
    need_grad_q_weight: bool,
    need_grad_k_weight: bool,
    need_grad_q_bias: bool,
    need_grad_k_bias: bool,
) -> tuple[Tensor, ...]:
    def one(
        grad: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, need: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows_of(x, across_heads)
        grad = torch.zeros_like(rows) if grad is None else grad.to(rows.dtype)
        # turned back, that is by the opposite angle
        grad = rotated(grad.reshape(x.shape), cos, None if sin is None else -sin, interleaved).reshape(rows.shape)
        of_weight, of_bias = x.new_empty(0), x.new_empty(0)
        if need[2] and bias is not None:
            of_bias = over_rows(grad).to(bias.dtype)
        if norm is None:
            return grad.view(x.shape).to(x.dtype) if need[0] else x.new_empty(0), of_weight, of_bias
        normed, rstd = normalized(rows, norm, eps)
        if need[1] and weight is not None:
            of_weight = over_rows(grad * normed).to(weight.dtype)
        if not need[0]:
            return x.new_empty(0), of_weight, of_bias
        if weight is not None:
            grad = grad * weight.to(rows.dtype)
        along = normed * (grad * normed).mean(-1, keepdim=True)
        if norm == "layer":
            along = along + grad.mean(-1, keepdim=True)
        return (rstd * (grad - along)).view(x.shape).to(x.dtype), of_weight, of_bias

    of_q = one(grad_rotated_q, q, q_weight, q_bias, (need_grad_q, need_grad_q_weight, need_grad_q_bias))
    of_k = one(grad_rotated_k, k, k_weight, k_bias, (need_grad_k, need_grad_k_weight, need_grad_k_bias))
    return tuple(gradient for pair in zip(of_q, of_k, strict=True) for gradient in pair)


def rows_of(x: Tensor, across_heads: bool) -> Tensor:
    """(B, T, H, D) or, across heads, (B, T, H D), wide and contiguous."""
    x = x.to(wide_dtype(x)).contiguous()
    return x.flatten(2) if across_heads else x


def over_rows(values: Tensor) -> Tensor:
    """The sum over all rows."""
    return values.sum(tuple(range(values.dim() - 1)))


def normalized(rows: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of mean square 1, for "layer" about their mean; and what multiplies them for that, (..., 1)."""
    if norm == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows - rows.mean(-1, keepdim=True)  # what the rounding of a mean far from 0 left of it
    rstd = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return rows * rstd, rstd


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """(B, T, H, D), each pair of the first channels turned by its angle."""
    if cos is None or sin is None:
        return x
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))  # (T, 1, P) or (B, T, 1, P)
    P = cos.shape[-1]
    turned, rest = x[..., : 2 * P], x[..., 2 * P :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :P], turned[..., P:]
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1)
