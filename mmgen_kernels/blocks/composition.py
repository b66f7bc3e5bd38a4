"""Forward and backward of the blocks, composed of the families' operators and of torch's matrix products.

What autograd would keep between them is not kept: the modulated input of a projection and what the activation gives are computed
again in the backward, each by one pass over what is kept anyway. Each function without annotations is the kernel of an operator in
ops.py, which runs it without autograd and autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgen_kernels.backends import run
from mmgen_kernels.blocks.activation import FUSED

Gradients = dict[str, Tensor | None]  # by the name of what they are of
Needs = dict[str, bool]


class Attention(NamedTuple):
    """Of self-attention: its projections, and which tokens see each other."""

    qkv_weight: Tensor  # (3 H head_dim, D)
    qkv_bias: Tensor | None
    proj_weight: Tensor  # (D, H head_dim)
    proj_bias: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    num_heads: int
    scale: float
    deterministic: bool


class QKNorm(NamedTuple):
    """Of queries and keys before the attention; neither norm nor angles: nothing."""

    q_weight: Tensor | None  # (head_dim,)
    k_weight: Tensor | None
    q_bias: Tensor | None
    k_bias: Tensor | None
    cos: Tensor | None  # (T, P) or (B, T, P)
    sin: Tensor | None
    kind: str | None
    eps: float
    interleaved: bool


class MLP(NamedTuple):
    fc1_weight: Tensor  # (M, D), with swiglu (2 M, D)
    fc1_bias: Tensor | None
    fc2_weight: Tensor  # (D, M)
    fc2_bias: Tensor | None
    activation: str


class Norm(NamedTuple):
    """The modulated norm before a half of the block, and the dtype of what it gives."""

    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    rows: Tensor | None
    kind: str
    eps: float
    dtype: torch.dtype


# -- the halves: (B, T, D) -> (B, T, D), and back ---------------------------------------------------------------------


def attend(h: Tensor, of: Attention, qk: QKNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The half's output, and what its backward keeps."""
    qkv = F.linear(h, of.qkv_weight, of.qkv_bias)  # (B, T, 3 H head_dim)
    attended, lse = run("attention", "attn", *turned(heads(qkv, of.num_heads), qk), *seen(of))  # (B, T, H, head_dim), (B, H, T)
    return F.linear(attended.flatten(2), of.proj_weight, of.proj_bias), qkv, attended, lse


def attend_backward(
    grad: Tensor, h: Callable[[], Tensor], qkv: Tensor, attended: Tensor, lse: Tensor, of: Attention, qk: QKNorm, need: Needs
) -> Gradients:
    """`h` computes the half's input again."""
    found: Gradients = {}
    inner = any(need[name] for name in ("h", "qkv_weight", "qkv_bias", *OF_QK))
    of_attended, found["proj_weight"], found["proj_bias"] = linear_backward(
        grad, lambda: attended.flatten(2), of.proj_weight, inner, need["proj_weight"], need["proj_bias"]
    )
    if of_attended is None:
        return found
    q, k, v = heads(qkv, of.num_heads)
    of_q, of_k, of_v, _ = run(
        "attention_backward", "attn", of_attended.view(attended.shape), None, *turned((q, k, v), qk), *seen(of)[:4],
        attended, lse, *seen(of)[4:], True, True, True, False,
    )  # fmt: skip
    if turns(qk):
        of_q, of_k, *of_affine = run(
            "qk_norm_rope_backward", "attn", of_q, of_k, q, k, *qk[:6], qk.kind, False, qk.eps, qk.interleaved,
            True, True, *(need[name] for name in OF_QK),
        )  # fmt: skip
        found |= dict(zip(OF_QK, of_affine, strict=True))
    found["h"], found["qkv_weight"], found["qkv_bias"] = linear_backward(
        torch.stack((of_q, of_k, of_v), 2).view(qkv.shape), h, of.qkv_weight, need["h"], need["qkv_weight"], need["qkv_bias"]
    )
    return found


def feed_forward(h: Tensor, of: MLP, keep: bool) -> tuple[Tensor, Tensor]:
    """The half's output, and what its backward keeps: the input of the activation (empty unless `keep`)."""
    if not keep and of.activation == EPILOGUE.get(h.device.type) and of.fc1_bias is not None:
        activated = torch._addmm_activation(of.fc1_bias, h.flatten(0, 1), of.fc1_weight.t(), use_gelu=True)
        return F.linear(activated.view(*h.shape[:2], -1), of.fc2_weight, of.fc2_bias), h.new_empty(0)
    hidden = F.linear(h, of.fc1_weight, of.fc1_bias)  # (B, T, M)
    return F.linear(activate(hidden, of.activation), of.fc2_weight, of.fc2_bias), hidden


def feed_forward_backward(
    grad: Tensor, h: Callable[[], Tensor], hidden: Tensor, of: MLP, need: Needs
) -> Gradients:
    # what the activation gave is computed again in the pass that differentiates it, before the weight that needs it
    of_hidden, activated = activate_backward(grad @ of.fc2_weight, hidden, of.activation)
    rows, found = grad.flatten(0, -2), Gradients()  # (N, D)
    found["fc2_weight"] = rows.t() @ activated.flatten(0, -2) if need["fc2_weight"] else None
    found["fc2_bias"] = rows.sum(0) if need["fc2_bias"] else None
    del activated  # as large as hidden
    found["h"], found["fc1_weight"], found["fc1_bias"] = linear_backward(
        of_hidden, h, of.fc1_weight, need["h"], need["fc1_weight"], need["fc1_bias"]
    )
    return found


# -- their parts ------------------------------------------------------------------------------------------------------


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k and v, (B, T, H, head_dim) each: views, which attention reads where they lie."""
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)


OF_QK = QKNorm._fields[:4]  # what has a gradient


def turns(qk: QKNorm) -> bool:
    return qk.kind is not None or qk.cos is not None


def turned(qkv: tuple[Tensor, ...], qk: QKNorm) -> tuple[Tensor, ...]:
    """Queries and keys normalized and turned by their positions, where they are to be."""
    if not turns(qk):
        return qkv
    q, k, v = qkv
    return *run("qk_norm_rope", "attn", q, k, *qk[:6], qk.kind, False, qk.eps, qk.interleaved), v


def seen(of: Attention) -> tuple[Any, ...]:
    """The arguments of the operator behind q, k and v."""
    return None, of.key_lengths, of.cu_seqlens, of.cu_seqlens, False, of.scale, of.deterministic


def linear_backward(
    grad: Tensor, input: Callable[[], Tensor], weight: Tensor, need_input: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of ``F.linear(input(), weight, bias)``; the input is asked for only where the weight needs it."""
    rows = grad.flatten(0, -2)  # (N, out)
    return (
        grad @ weight if need_input else None,
        rows.t() @ input().flatten(0, -2) if need_weight else None,
        rows.sum(0) if need_bias else None,
    )


def activate(hidden: Tensor, activation: str) -> Tensor:
    return run("mlp_activation", "blocks", hidden, activation) if activation in FUSED else F.gelu(hidden)


def activate_backward(grad: Tensor, hidden: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradient of hidden, and the activation again."""
    if activation in FUSED:
        return run("mlp_activation_backward", "blocks", grad, hidden, activation, True)
    return torch.ops.aten.gelu_backward(grad, hidden), F.gelu(hidden)


# What torch._addmm_activation computes behind the product: on CUDA an epilogue of cuBLASLt, which saves a pass over (N, M), but
# does not give what a backward would need.
EPILOGUE = {"cuda": "gelu_tanh", "cpu": "gelu"}


# -- what is around a half --------------------------------------------------------------------------------------------


def modulated(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """adaln(x) and its statistics."""
    h, _, statistics = run(
        "adaln", "modulation", x, norm.shift, norm.scale, None, None, norm.weight, norm.bias, None, norm.rows, norm.kind,
        norm.eps, norm.dtype,
    )  # fmt: skip
    return h, statistics


def gated(x: Tensor, y: Tensor, gate: Tensor | None, rows: Tensor | None) -> Tensor:
    return run("gate_residual", "modulation", x, y, gate, None, None, rows, "identity", None, 0.0)[0]


def through_gate(
    grad: Tensor, update: Tensor, gate: Tensor | None, norm: Norm, need_gate: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of y and gate in x + gate * y; `update` is y, where there is a gate."""
    if gate is None:
        return grad.to(norm.dtype), None
    of_y, of_gate, _, _ = run(
        "gate_residual_backward", "modulation", grad, update, update.new_empty(0), gate, None, None, norm.rows, "identity",
        None, True, need_gate, False, False,
    )  # fmt: skip
    return of_y, of_gate


def through_norm(grad: Tensor, of_modulated: Tensor | None, x: Tensor, statistics: Tensor, norm: Norm, need: Needs) -> Gradients:
    """Of (x, adaln(x)), which have the gradients `grad` and `of_modulated`, in one pass: that of a seam which adds nothing to x."""
    of_x, _, _, of_shift, of_scale, _, _, of_weight, of_bias, _, _ = run(
        "gate_residual_adaln_backward", "modulation", grad, of_modulated, None, x, x, statistics, statistics.new_empty(0), None,
        norm.shift, norm.scale, None, None, norm.weight, norm.bias, None, None, norm.rows, "identity", None, norm.kind,
        need["x"], False, False, need["shift"], need["scale"], False, False, need["weight"], need["bias"], False, False,
    )  # fmt: skip
    return {"x": of_x, "shift": of_shift, "scale": of_scale, "weight": of_weight, "bias": of_bias}


def kept(keep: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What a backward needs, statistics first; where there will be none, or it does not need it, an empty tensor."""
    statistics = tensors[0]
    assert statistics is not None
    return tuple(t if keep and t is not None else statistics.new_empty(0) for t in tensors)


def needed(found: Gradients, need: Needs, names: tuple[str, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients in the order of the names; one that nobody needs is empty."""
    gradients = (found.get(name) if need[name] else None for name in names)
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


# -- x + gate * half(adaln(x)) ----------------------------------------------------------------------------------------

OF_NORM = ("x", "shift", "scale", "weight", "bias")


def adaln_attention(
    x, shift, scale, gate, weight, bias, qkv_weight, qkv_bias, proj_weight, proj_bias, q_weight, k_weight, q_bias, k_bias,
    cos, sin, key_lengths, cu_seqlens, rows, num_heads, norm, eps, qk_norm, qk_eps, interleaved, attention_scale, deterministic,
    keep,
):  # fmt: skip
    of = Attention(
        qkv_weight, qkv_bias, proj_weight, proj_bias, key_lengths, cu_seqlens, num_heads, attention_scale, deterministic
    )
    h, statistics = modulated(x, Norm(shift, scale, weight, bias, rows, norm, eps, qkv_weight.dtype))
    y, qkv, attended, lse = attend(h, of, QKNorm(q_weight, k_weight, q_bias, k_bias, cos, sin, qk_norm, qk_eps, interleaved))
    out = gated(x, y, gate, rows)
    return out, *kept(keep, statistics, qkv, attended, lse, y if gate is not None else None)


def adaln_attention_backward(
    grad_out, x, statistics, qkv, attended, lse, update, shift, scale, gate, weight, bias,
    qkv_weight, qkv_bias, proj_weight, proj_bias, q_weight, k_weight, q_bias, k_bias, cos, sin, key_lengths, cu_seqlens, rows,
    num_heads, norm, eps, qk_norm, qk_eps, interleaved, attention_scale, deterministic, needs,
):  # fmt: skip
    of = Attention(
        qkv_weight, qkv_bias, proj_weight, proj_bias, key_lengths, cu_seqlens, num_heads, attention_scale, deterministic
    )
    before = Norm(shift, scale, weight, bias, rows, norm, eps, qkv_weight.dtype)
    qk = QKNorm(q_weight, k_weight, q_bias, k_bias, cos, sin, qk_norm, qk_eps, interleaved)
    names = (*Attention._fields[:4], *OF_QK)
    return half_backward(
        grad_out, x, statistics, update, gate, before, names, needs,
        lambda grad, h, need: attend_backward(grad, h, qkv, attended, lse, of, qk, need),
    )  # fmt: skip


def adaln_mlp(
    x, shift, scale, gate, weight, bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, rows, activation, norm, eps, keep
):
    h, statistics = modulated(x, Norm(shift, scale, weight, bias, rows, norm, eps, fc1_weight.dtype))
    y, hidden = feed_forward(h, MLP(fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation), keep)
    return gated(x, y, gate, rows), *kept(keep, statistics, hidden, y if gate is not None else None)


def adaln_mlp_backward(
    grad_out, x, statistics, hidden, update, shift, scale, gate, weight, bias,
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, rows, activation, norm, eps, needs,
):  # fmt: skip
    of = MLP(fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    before = Norm(shift, scale, weight, bias, rows, norm, eps, fc1_weight.dtype)
    return half_backward(
        grad_out, x, statistics, update, gate, before, MLP._fields[:4], needs,
        lambda grad, h, need: feed_forward_backward(grad, h, hidden, of, need),
    )  # fmt: skip


def half_backward(
    grad: Tensor | None, x: Tensor, statistics: Tensor, update: Tensor, gate: Tensor | None, norm: Norm,
    projections: tuple[str, ...], needs: list[bool], through_half: Callable[[Tensor, Callable, Needs], Gradients],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of x, shift, scale, gate, weight, bias and the projections."""
    names = ("x", "shift", "scale", "gate", "weight", "bias", *projections)
    need = dict(zip(names, needs, strict=True))
    need["h"] = any(need[name] for name in OF_NORM)
    grad = torch.zeros_like(x) if grad is None else grad
    found: Gradients = {}
    of_half, found["gate"] = through_gate(grad, update, gate, norm, need["gate"])
    if need["h"] or any(need[name] for name in projections):
        found |= through_half(of_half, lambda: modulated(x, norm)[0], need)
    if need["h"]:
        found |= through_norm(grad, found["h"], x, statistics, norm, need)
    return needed(found, need, names, x)


# -- a whole block: both halves, and the seam between them in one pass ------------------------------------------------


def dit_block(
    x, shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, norm1_weight, norm1_bias, norm2_weight, norm2_bias,
    qkv_weight, qkv_bias, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, q_weight, k_weight, q_bias, k_bias,
    cos, sin, key_lengths, cu_seqlens, rows, num_heads, activation, norm, eps, qk_norm, qk_eps, interleaved, attention_scale,
    deterministic, keep,
):  # fmt: skip
    attention = Attention(
        qkv_weight, qkv_bias, proj_weight, proj_bias, key_lengths, cu_seqlens, num_heads, attention_scale, deterministic
    )
    dtype = qkv_weight.dtype
    h, statistics = modulated(x, Norm(shift_msa, scale_msa, norm1_weight, norm1_bias, rows, norm, eps, dtype))
    qk = QKNorm(q_weight, k_weight, q_bias, k_bias, cos, sin, qk_norm, qk_eps, interleaved)
    y, qkv, attended, lse = attend(h, attention, qk)
    residual, h, _, statistics_2, _ = run(
        "gate_residual_adaln", "modulation", x, y, gate_msa, shift_mlp, scale_mlp, None, None, norm2_weight, norm2_bias,
        None, None, rows, "identity", None, 0.0, norm, eps, dtype,
    )  # fmt: skip
    z, hidden = feed_forward(h, MLP(fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation), keep)
    out = gated(residual, z, gate_mlp, rows)
    updates = (y if gate_msa is not None else None, z if gate_mlp is not None else None)
    return out, *kept(keep, statistics, statistics_2, qkv, attended, lse, residual, hidden, *updates)


def dit_block_backward(
    grad_out, x, statistics, statistics_2, qkv, attended, lse, residual, hidden, update_msa, update_mlp,
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, norm1_weight, norm1_bias, norm2_weight, norm2_bias,
    qkv_weight, qkv_bias, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, q_weight, k_weight, q_bias, k_bias,
    cos, sin, key_lengths, cu_seqlens, rows, num_heads, activation, norm, eps, qk_norm, qk_eps, interleaved, attention_scale,
    deterministic, needs,
):  # fmt: skip
    names = (
        "x", "shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp",
        "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", *Attention._fields[:4], *MLP._fields[:4], *OF_QK,
    )  # fmt: skip
    need = dict(zip(names, needs, strict=True)) | {"h": True}
    attention = Attention(
        qkv_weight, qkv_bias, proj_weight, proj_bias, key_lengths, cu_seqlens, num_heads, attention_scale, deterministic
    )
    mlp = MLP(fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    dtype = qkv_weight.dtype
    first = Norm(shift_msa, scale_msa, norm1_weight, norm1_bias, rows, norm, eps, dtype)
    second = Norm(shift_mlp, scale_mlp, norm2_weight, norm2_bias, rows, norm, eps, dtype)
    grad = torch.zeros_like(x) if grad_out is None else grad_out
    found: Gradients = {}

    of_half, found["gate_mlp"] = through_gate(grad, update_mlp, gate_mlp, second, need["gate_mlp"])
    found |= feed_forward_backward(of_half, lambda: modulated(residual, second)[0], hidden, mlp, need)
    y = residual if gate_msa is None else update_msa  # without a gate it is not read
    grad, of_half, *of_seam = run(
        "gate_residual_adaln_backward", "modulation", grad, found["h"], None, y, residual, statistics_2,
        statistics_2.new_empty(0), gate_msa, shift_mlp, scale_mlp, None, None, norm2_weight, norm2_bias, None, None, rows,
        "identity", None, norm, True, True, need["gate_msa"], need["shift_mlp"], need["scale_mlp"], False, False,
        need["norm2_weight"], need["norm2_bias"], False, False,
    )  # fmt: skip
    found["gate_msa"], found["shift_mlp"], found["scale_mlp"], _, _, found["norm2_weight"], found["norm2_bias"], *_ = of_seam
    qk = QKNorm(q_weight, k_weight, q_bias, k_bias, cos, sin, qk_norm, qk_eps, interleaved)
    found |= attend_backward(of_half.to(dtype), lambda: modulated(x, first)[0], qkv, attended, lse, attention, qk, need)
    of_block = ("x", "shift_msa", "scale_msa", "norm1_weight", "norm1_bias")
    wanted = {name: need[own] for name, own in zip(OF_NORM, of_block, strict=True)}
    of_norm = through_norm(grad, found["h"], x, statistics, first, wanted)
    found |= {own: of_norm[name] for name, own in zip(OF_NORM, of_block, strict=True)}
    return needed(found, need, names, x)
