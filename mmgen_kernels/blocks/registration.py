"""The operators of the family: schemas and fakes. Their kernels are composition.py's.

What no backward will need, and gradients that nobody needs, are empty tensors in the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels import library
from mmgen_kernels.attn.ops import ATTENTION as SELF_ATTENTION
from mmgen_kernels.attn.qk_norm_rope import QK_NORM_ROPE
from mmgen_kernels.blocks import composition
from mmgen_kernels.blocks.activation import MLP_ACTIVATION
from mmgen_kernels.modulation.ops import ADALN, GATE_RESIDUAL, GATE_RESIDUAL_ADALN


def like_statistics(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def kept_fakes(keep: bool, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Behind the statistics of x."""
    found = (like_statistics(x, *x.shape[:2], 2), *tensors)
    return tuple(t if keep and t is not None else like_statistics(x, 0) for t in found)


def update_fake(x: Tensor, gate: Tensor | None, projection: Tensor) -> Tensor | None:
    return None if gate is None else projection.new_empty(x.shape)


def attention_fakes(x: Tensor, qkv_weight: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, the attention's output and its lse."""
    B, T, _ = x.shape
    width = qkv_weight.shape[0] // 3
    q = qkv_weight.new_empty(B, T, num_heads, width // num_heads)
    return qkv_weight.new_empty(B, T, 3 * width), *SELF_ATTENTION.fake(q, q, q, None, None, None, None, False, 1.0, True)


def adaln_attention_fake(
    x, shift, scale, gate, weight, bias, qkv_weight, qkv_bias, proj_weight, proj_bias, q_weight, k_weight, q_bias, k_bias,
    cos, sin, key_lengths, cu_seqlens, rows, num_heads, norm, eps, qk_norm, qk_eps, interleaved, attention_scale, deterministic,
    keep,
):  # fmt: skip
    of_attention = attention_fakes(x, qkv_weight, num_heads)
    return x.new_empty(x.shape), *kept_fakes(keep, x, *of_attention, update_fake(x, gate, qkv_weight))


def adaln_mlp_fake(
    x, shift, scale, gate, weight, bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, rows, activation, norm, eps, keep
):  # fmt: skip
    hidden = fc1_weight.new_empty(*x.shape[:2], fc1_weight.shape[0])
    return x.new_empty(x.shape), *kept_fakes(keep, x, hidden, update_fake(x, gate, fc1_weight))


def dit_block_fake(
    x, shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, norm1_weight, norm1_bias, norm2_weight, norm2_bias,
    qkv_weight, qkv_bias, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, q_weight, k_weight, q_bias, k_bias,
    cos, sin, key_lengths, cu_seqlens, rows, num_heads, activation, norm, eps, qk_norm, qk_eps, interleaved, attention_scale,
    deterministic, keep,
):  # fmt: skip
    hidden = fc1_weight.new_empty(*x.shape[:2], fc1_weight.shape[0])
    of_attention = attention_fakes(x, qkv_weight, num_heads)
    updates = (update_fake(x, gate, qkv_weight) for gate in (gate_msa, gate_mlp))
    statistics_2, residual = like_statistics(x, *x.shape[:2], 2), x.new_empty(x.shape)
    return x.new_empty(x.shape), *kept_fakes(keep, x, statistics_2, *of_attention, residual, hidden, *updates)


def gradients_fake(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    x = inputs[0]
    assert x is not None
    return tuple(
        x.new_empty(of.shape, dtype=of.dtype) if need and of is not None else x.new_empty(0)
        for of, need in zip(inputs, needs, strict=True)
    )


def of(names: Sequence[str], kind: str) -> str:
    return ", ".join(f"{kind}{name}" for name in names)


QK_AFFINE = tuple(f"Tensor? {name}" for name in composition.OF_QK)
VISIBILITY = "Tensor? cos, Tensor? sin, Tensor? key_lengths, Tensor? cu_seqlens"
QK_NORM = "str? qk_norm, float qk_eps, bool interleaved"
ATTENTION = ("Tensor qkv_weight", "Tensor? qkv_bias", "Tensor proj_weight", "Tensor? proj_bias")
MLP = ("Tensor fc1_weight", "Tensor? fc1_bias", "Tensor fc2_weight", "Tensor? fc2_bias")
HALF = ("Tensor x", "Tensor? shift", "Tensor? scale", "Tensor? gate", "Tensor? weight", "Tensor? bias")
BLOCK = (
    "Tensor x",
    *(f"Tensor? {vector}_{half}" for half in ("msa", "mlp") for vector in ("shift", "scale", "gate")),
    *(f"Tensor? norm{i}_{parameter}" for i in (1, 2) for parameter in ("weight", "bias")),
)


def define(
    name: str, tensors: tuple[str, ...], options: str, keeps: tuple[str, ...], fake: Any, parts: tuple[library.Operator, ...]
) -> library.Operator:
    """`tensors` have gradients; `keeps`: what the forward keeps for its backward."""
    names = [tensor.split()[-1] for tensor in tensors]
    return library.define(
        f"{name}({', '.join(tensors)}, {options}, bool keep) -> (Tensor out, {of(keeps, 'Tensor ')})",
        reference=getattr(composition, name),
        fake=fake,
        backward=f"{name}_backward(Tensor? grad_out, {tensors[0]}, {of(keeps, 'Tensor ')}, {', '.join(tensors[1:])}, {options},"
        f" bool[] needs) -> ({of(names, 'Tensor grad_')})",
        backward_reference=getattr(composition, f"{name}_backward"),
        backward_fake=lambda grad_out, *args: gradients_fake(
            (args[0], *args[1 + len(keeps) : len(tensors) + len(keeps)]), args[-1]
        ),
        parts=parts,
    )


ADALN_ATTENTION = define(
    "adaln_attention",
    (*HALF, *ATTENTION, *QK_AFFINE),
    f"{VISIBILITY}, Tensor? rows, int num_heads, str norm, float eps, {QK_NORM}, float attention_scale, bool deterministic",
    ("statistics", "qkv", "attended", "lse", "update"),
    adaln_attention_fake,
    (ADALN, QK_NORM_ROPE, SELF_ATTENTION, GATE_RESIDUAL, GATE_RESIDUAL_ADALN),
)
ADALN_MLP = define(
    "adaln_mlp",
    (*HALF, *MLP),
    "Tensor? rows, str activation, str norm, float eps",
    ("statistics", "hidden", "update"),
    adaln_mlp_fake,
    (ADALN, MLP_ACTIVATION, GATE_RESIDUAL, GATE_RESIDUAL_ADALN),
)
DIT_BLOCK = define(
    "dit_block",
    (*BLOCK, *ATTENTION, *MLP, *QK_AFFINE),
    f"{VISIBILITY}, Tensor? rows, int num_heads, str activation, str norm, float eps, {QK_NORM}, float attention_scale,"
    " bool deterministic",
    ("statistics", "statistics_2", "qkv", "attended", "lse", "residual", "hidden", "update_msa", "update_mlp"),
    dit_block_fake,
    (ADALN, QK_NORM_ROPE, SELF_ATTENTION, MLP_ACTIVATION, GATE_RESIDUAL, GATE_RESIDUAL_ADALN),
)
