"""The public functions of the family: what they compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels import library
from mmgen_kernels.blocks.checks import (
    check_affine,
    check_heads,
    check_norm,
    check_projection,
    check_qk_norm,
    check_rows,
    check_vectors,
    check_visibility,
    check_x,
    hidden_width,
)
from mmgen_kernels.blocks.registration import ADALN_ATTENTION, ADALN_MLP, DIT_BLOCK
from mmgen_kernels.checks import check_number
from mmgen_kernels.library import COMPOSED


def adaln_attention(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    qk_norm: str | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    qk_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    attention_scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """The attention half of a DiT block as one autograd node.

    ``x + gate * proj(attention(qkv(adaln(x, shift, scale))))``. The backward computes the modulated input again, from x: kept are
    x, qkv, the attention's output and, where there is a gate, what it multiplies.

    Args:
        x: (B, T, D), the residual stream; fp64, fp32, bf16 or fp16.
        shift, scale, gate: modulation vectors (D,), (B, D) or (B, F, D), F spans of equal length (F = T: each token its own); with
            `rows` (R, D). None is none (gate: 1).
        qkv_weight, qkv_bias: (3 H head_dim, D) and (3 H head_dim,): q, k and v one after the other, heads within, as timm has it.
        proj_weight, proj_bias: (D, H head_dim) and (D,). All projections have one dtype, in which products and attention run; it
            may be narrower than x's. A bias may be None.
        num_heads: H; head_dim is a multiple of 8 up to 256.
        norm: "layer" or "rms".
        weight, bias: (D,), of the norm.
        eps: added to the variance.
        qk_norm, q_weight, k_weight, q_bias, k_bias, qk_eps, cos, sin, interleaved: norm and rotary embedding of queries and keys
            between projection and attention, for each head, as in `qk_norm_rope`, whose norm and eps are qk_norm and qk_eps here.
            The backward computes both again.
        attention_scale: 1 / sqrt(head_dim) if None.
        key_lengths: int32 or int64 (B,): the tokens of sample b that are seen.
        cu_seqlens: int32 or int64 (C + 1,): x is (1, N, D), sequences one after the other that see nothing of each other.
        rows: int32 or int64 (B, T): token t takes row ``rows[t]`` of the vectors.
        deterministic: as in `attention`.

    Returns:
        (B, T, D), x's dtype, autocast or not. Under autocast the projections are cast to its dtype, as torch's linear casts them;
        fp64 is not. Differentiable once, in every float tensor.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a NaN or Inf in a token spoils that token and the tokens of its sample that see it, and no other sample.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, section 3.2; Dao et al. 2022, FlashAttention.
    """
    check_x(x)
    check_rows(rows, x)
    check_vectors(x, rows, shift=shift, scale=scale, gate=gate)
    projections = autocast(x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    width = check_attention(x, projections, num_heads, key_lengths, cu_seqlens)
    check_norm(norm, eps)
    check_affine(x, weight=weight, bias=bias)
    affine = (q_weight, k_weight, q_bias, k_bias)
    check_qk_norm(x, width // num_heads, qk_norm, qk_eps, affine, cos, sin)
    tensors = (x, shift, scale, gate, weight, bias, *projections, *affine)
    return ADALN_ATTENTION(
        COMPOSED, *tensors, cos, sin, key_lengths, cu_seqlens, rows, num_heads, norm, float(eps), qk_norm, float(qk_eps),
        interleaved, scale_of(attention_scale, width // num_heads), deterministic, keeps(tensors),
    )[0]  # fmt: skip


def adaln_mlp(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rows: Tensor | None = None,
) -> Tensor:
    """The MLP half of a DiT block as one autograd node.

    ``x + gate * fc2(activation(fc1(adaln(x, shift, scale))))``. The backward computes the modulated input and the activation again:
    kept are x, what the activation got and, where there is a gate, what it multiplies.

    Args:
        x, shift, scale, gate, norm, weight, bias, eps, rows: as in `adaln_attention`.
        fc1_weight, fc1_bias: (M, D) and (M,); swiglu (2 M, D) and (2 M,), the half that passes through SiLU first.
        fc2_weight, fc2_bias: (D, M) and (D,). Both projections have one dtype; a bias may be None.
        activation: "gelu_tanh", "gelu" or "swiglu", ``silu(a) * b`` of the two halves.

    Returns:
        (B, T, D), x's dtype; autocast and derivatives as in `adaln_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a NaN or Inf in a token spoils that token and no other.

    Source: Peebles and Xie 2022, section 3.2; swiglu: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    check_x(x)
    check_rows(rows, x)
    check_vectors(x, rows, shift=shift, scale=scale, gate=gate)
    projections = autocast(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_mlp(x, projections, activation, projections[0])
    check_norm(norm, eps)
    check_affine(x, weight=weight, bias=bias)
    tensors = (x, shift, scale, gate, weight, bias, *projections)
    return ADALN_MLP(COMPOSED, *tensors, rows, activation, norm, float(eps), keeps(tensors))[0]


def dit_block(
    x: Tensor,
    shift_msa: Tensor | None,
    scale_msa: Tensor | None,
    gate_msa: Tensor | None,
    shift_mlp: Tensor | None,
    scale_mlp: Tensor | None,
    gate_mlp: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    num_heads: int,
    activation: str = "gelu_tanh",
    norm: str = "layer",
    norm1_weight: Tensor | None = None,
    norm1_bias: Tensor | None = None,
    norm2_weight: Tensor | None = None,
    norm2_bias: Tensor | None = None,
    eps: float = 1e-6,
    qk_norm: str | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    qk_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    attention_scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """A DiT block as one autograd node: `adaln_attention` and `adaln_mlp`, and the seam between them in one pass.

    Between the halves, ``gate_residual_adaln`` adds the attention's output and modulates the sum for the MLP. For each token the
    backward keeps 8 D + M numbers, 12 D with M = 4 D, where autograd keeps 20 D of the same block in separate operations.

    Args:
        x, rows, num_heads, norm, eps, qk_norm, q_weight, k_weight, q_bias, k_bias, qk_eps, cos, sin, interleaved, attention_scale,
            key_lengths, cu_seqlens, deterministic, qkv_weight, qkv_bias, proj_weight, proj_bias: as in `adaln_attention`.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation: as in `adaln_mlp`; all four projections have one dtype.
        shift_msa, scale_msa, gate_msa: the attention's modulation vectors, as `adaln_attention` has them.
        shift_mlp, scale_mlp, gate_mlp: those of the MLP.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (D,), of the norms.

    Returns:
        (B, T, D), x's dtype; autocast and derivatives as in `adaln_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: as in `adaln_attention`.

    Source: Peebles and Xie 2022, section 3.2.
    """
    check_x(x)
    check_rows(rows, x)
    check_vectors(
        x, rows, shift_msa=shift_msa, scale_msa=scale_msa, gate_msa=gate_msa, shift_mlp=shift_mlp, scale_mlp=scale_mlp,
        gate_mlp=gate_mlp,
    )  # fmt: skip
    projections = autocast(x, qkv_weight, qkv_bias, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    width = check_attention(x, projections[:4], num_heads, key_lengths, cu_seqlens)
    check_mlp(x, projections[4:], activation, projections[0])
    check_norm(norm, eps)
    norms = (norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    check_affine(x, norm1_weight=norm1_weight, norm1_bias=norm1_bias, norm2_weight=norm2_weight, norm2_bias=norm2_bias)
    affine = (q_weight, k_weight, q_bias, k_bias)
    check_qk_norm(x, width // num_heads, qk_norm, qk_eps, affine, cos, sin)
    tensors = (x, shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, *norms, *projections, *affine)
    return DIT_BLOCK(
        COMPOSED, *tensors, cos, sin, key_lengths, cu_seqlens, rows, num_heads, activation, norm, float(eps), qk_norm,
        float(qk_eps), interleaved, scale_of(attention_scale, width // num_heads), deterministic, keeps(tensors),
    )[0]  # fmt: skip


def check_attention(
    x: Tensor, projections: Sequence[Any], num_heads: int, key_lengths: Tensor | None, cu_seqlens: Tensor | None
) -> int:
    """The width of all heads together."""
    qkv_weight, qkv_bias, proj_weight, proj_bias = projections
    width, D = check_heads(num_heads, qkv_weight), x.shape[-1]
    check_projection("qkv", qkv_weight, qkv_bias, (3 * width, D), qkv_weight, x)
    check_projection("proj", proj_weight, proj_bias, (D, width), qkv_weight, x)
    check_visibility(key_lengths, cu_seqlens, x)
    return width


def check_mlp(x: Tensor, projections: Sequence[Any], activation: str, like: Any) -> None:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = projections
    width, D = hidden_width(fc1_weight, activation), x.shape[-1]
    check_projection("fc1", fc1_weight, fc1_bias, (fc1_weight.shape[0], D), like, x)
    check_projection("fc2", fc2_weight, fc2_bias, (D, width), like, x)


def autocast(x: Tensor, *projections: Tensor | None) -> list[Tensor | None]:
    """As torch's linear has them under autocast."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta has no autocast to ask for
        return list(projections)
    dtype = torch.get_autocast_dtype(kind)
    return [p.to(dtype) if isinstance(p, Tensor) and p.is_floating_point() and p.dtype != torch.float64 else p for p in projections]


def scale_of(attention_scale: float | None, head_dim: int) -> float:
    if attention_scale is None:
        return head_dim**-0.5
    check_number("attention_scale", attention_scale)
    if not math.isfinite(attention_scale):
        raise ValueError(f"attention_scale must be finite, got {attention_scale}")
    return float(attention_scale)


def keeps(tensors: Sequence[Tensor | None]) -> bool:
    """Whether there may be a backward, which needs what the forward keeps."""
    if not torch.compiler.is_compiling() and library.functorch_is_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
