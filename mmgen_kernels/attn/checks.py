"""What the public functions of the family refuse. Metadata only: a look at a value would stop the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.checks import NORMS, check_choice, check_device, check_eps, check_floats, check_integers, check_number

FAMILY = "attn"
MAX_HEAD_DIM = 256


def check_qkv(q: Tensor, k: Tensor, v: Tensor, packed: bool, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """What is asked of a tensor is asked once: a look at its shape or device costs 0.2 us, and a small call takes 20."""
    of = names[0]
    check_floats(of, q)
    dtype, device, of_q = q.dtype, q.device, q.shape
    for name, tensor in ((names[1], k), (names[2], v)):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            raise TypeError(f"{name} must have {of}'s dtype {dtype}, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.device != device:
            check_device(name, tensor, of, q)
    of_k, dims = k.shape, 3 if packed else 4
    if len(of_q) != dims:
        shape = "(N, H, D) with cu_seqlens_q" if packed else "(B, T, H, D)"
        raise ValueError(f"{of} must be {shape}, got shape {tuple(of_q)}")
    heads, head_dim = of_q[-2], of_q[-1]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{of} must have a head dimension that is a multiple of 8, up to {MAX_HEAD_DIM}, got {head_dim}")
    if len(of_k) != dims or of_k[-1] != head_dim or not (packed or of_k[0] == of_q[0]):
        wanted = f"(M, G, {head_dim})" if packed else f"({of_q[0]}, S, G, {head_dim})"
        raise ValueError(f"{names[1]} must be {wanted}, got shape {tuple(of_k)}")
    if v.shape != of_k:
        raise ValueError(f"{names[2]} must have {names[1]}'s shape {tuple(of_k)}, got {tuple(v.shape)}")
    groups = of_k[-2]
    if groups < 1 or heads < 1 or heads % groups:
        raise ValueError(f"{names[1]} must have a number of heads that divides {of}'s {heads}, got {groups}")


def check_pair(name: str, pair: Sequence[Any]) -> None:
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of two streams, got {type(pair).__name__}")
    if len(pair) != 2:
        raise ValueError(f"{name} must be a tuple of two streams, got {len(pair)} (`attention` takes one)")


def check_joint(
    queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], key_lengths: Sequence[Tensor | None] | None
) -> None:
    for name, pair in (("queries", queries), ("keys", keys), ("values", values)):
        check_pair(name, pair)
    for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        check_qkv(q, k, v, False, (f"queries[{i}]", f"keys[{i}]", f"values[{i}]"))
    (q, other), (k, other_k) = queries, keys
    if other.dtype != q.dtype:
        raise TypeError(f"queries[1] must have queries[0]'s dtype {q.dtype}, got {other.dtype}")
    check_device("queries[1]", other, "queries[0]", q)
    if other.shape[0] != q.shape[0] or other.shape[2:] != q.shape[2:]:
        wanted = f"({q.shape[0]}, T, {q.shape[2]}, {q.shape[3]})"
        raise ValueError(f"queries[1] must be {wanted}, as queries[0] is, got shape {tuple(other.shape)}")
    if other_k.shape[2] != k.shape[2]:
        raise ValueError(f"keys[1] must have keys[0]'s {k.shape[2]} heads, got {other_k.shape[2]}")
    if key_lengths is None:
        return
    check_pair("key_lengths", key_lengths)
    for i, lengths in enumerate(key_lengths):
        if lengths is not None:
            check_integers(f"key_lengths[{i}]", lengths, "queries[0]", q)
            if lengths.shape != q.shape[:1]:
                raise ValueError(f"key_lengths[{i}] must be ({q.shape[0]},), a number for each sample, got {tuple(lengths.shape)}")


def as_bias(bias: Tensor | None, q: Tensor, k: Tensor, packed: bool) -> Tensor | None:
    """(1 or B, 1 or H, 1 or T, 1 or S)."""
    if bias is None:
        return None
    check_floats("bias", bias)
    if packed:
        raise ValueError("bias must be None with cu_seqlens_q: packed sequences have no common (T, S)")
    check_device("bias", bias, "q", q)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if bias.dim() > 4 or any(size not in (1, f) for size, f in zip(reversed(bias.shape), reversed(full), strict=False)):
        raise ValueError(f"bias must broadcast to (B, H, T, S) = {full}, got shape {tuple(bias.shape)}")
    return bias[(None,) * (4 - bias.dim())]


def check_key_lengths(key_lengths: Tensor | None, q: Tensor, packed: bool) -> None:
    if key_lengths is None:
        return
    if packed:
        raise ValueError("key_lengths must be None with cu_seqlens_q, which bounds the keys already")
    check_integers("key_lengths", key_lengths, "q", q)
    if key_lengths.shape != q.shape[:1]:
        raise ValueError(f"key_lengths must be ({q.shape[0]},), a number for each sample, got shape {tuple(key_lengths.shape)}")


def check_cu_seqlens(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, q: Tensor) -> None:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if (cu_seqlens_q is None) != (cu_seqlens_k is None):
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            raise ValueError(f"{missing} must be given where the other is, got None")
        return
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_integers(name, tensor, "q", q)
        shape = tuple(tensor.shape)
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"{name} must be (C + 1,) for C sequences, got shape {shape}")
        if shape != (wanted := tuple(cu_seqlens_q.shape)):
            raise ValueError(f"cu_seqlens_k must have cu_seqlens_q's shape {wanted}, got {shape}")


def check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    check_number("scale", scale)
    return float(scale)


def check_qk(q: Tensor, k: Tensor) -> None:
    check_floats("q", q)
    if not isinstance(k, Tensor) or k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype {q.dtype}, got {getattr(k, 'dtype', type(k).__name__)}")
    check_device("k", k, "q", q)
    if q.dim() != 4 or q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"q must be (B, T, H, D) with H and D at least 1, got shape {tuple(q.shape)}")
    B, _, _, D = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[2] < 1 or k.shape[3] != D:
        raise ValueError(f"k must be ({B}, S, G, {D}) with G at least 1, got shape {tuple(k.shape)}")


def check_norm(norm: str | None, across_heads: bool, eps: float) -> None:
    if norm is not None:
        check_choice("norm", norm, NORMS)
    elif across_heads:
        raise ValueError("across_heads must be False without a norm, got norm=None")
    check_eps("eps", eps)


def check_affine(name: str, parameter: Tensor | None, x: Tensor, norm: str | None, across_heads: bool) -> None:
    if parameter is None:
        return
    check_floats(name, parameter)
    if norm is None:
        raise ValueError(f"{name} needs a norm, got norm=None")
    width = x.shape[2] * x.shape[3] if across_heads else x.shape[3]
    if parameter.dim() != 1 or parameter.shape[0] != width:
        what = "H D, across heads" if across_heads else "D, shared by the heads"
        raise ValueError(f"{name} must be ({width},), {what}, got shape {tuple(parameter.shape)}")
    check_device(name, parameter, "q", x)


def check_table(cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor) -> None:
    if cos is None or sin is None:
        if (cos is None) != (sin is None):
            missing = "cos" if cos is None else "sin"
            raise ValueError(f"{missing} must be given where the other is, got None")
        return
    for name, table in (("cos", cos), ("sin", sin)):
        check_floats(name, table)
        check_device(name, table, "q", q)
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, as qk_norm_rope has none for it: pass {name}.detach()")
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin must have cos's dtype {cos.dtype}, got {sin.dtype}")
    B, T, _, D = q.shape
    if k.shape[1] != T:
        raise ValueError(f"k must have q's {T} tokens where cos and sin are given, got {k.shape[1]}")
    if cos.dim() not in (2, 3) or cos.shape[-2] != T or (cos.dim() == 3 and cos.shape[0] != B) or not 2 <= 2 * cos.shape[-1] <= D:
        raise ValueError(
            f"cos must be ({T}, P) or ({B}, {T}, P), an angle for each of P pairs of channels, P from 1 to {D // 2},"
            f" got shape {tuple(cos.shape)}; of a table that holds each angle twice pass cos[..., ::2] or the first half"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
