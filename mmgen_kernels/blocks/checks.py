"""What the public functions of the family refuse. Metadata only: a look at a value would stop the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.checks import NORMS, check_choice, check_device, check_eps, check_floats, check_integers

ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")


def check_x(x: Tensor) -> None:
    check_floats("x", x)
    if x.dim() != 3 or x.shape[-1] < 1:
        raise ValueError(f"x must be (B, T, D) with D >= 1, got shape {tuple(x.shape)}")


def check_norm(norm: str, eps: float) -> None:
    check_choice("norm", norm, NORMS)
    check_eps("eps", eps)


def check_vectors(x: Tensor, rows: Tensor | None, **vectors: Tensor | None) -> None:
    B, T, D = x.shape
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_floats(name, vector)
        check_device(name, vector, "x", x)
        fits = vector.dim() > 0 and vector.shape[-1] == D
        if rows is not None:
            fits = fits and (vector.dim() == 1 or (vector.dim() == 2 and vector.shape[0] > 0))
        else:
            fits = fits and (vector.dim() == 1 or (vector.dim() <= 3 and vector.shape[0] == B))
            fits = fits and (vector.dim() < 3 or (vector.shape[1] > 0 and T % vector.shape[1] == 0))
        if not fits:  # a size that is written is a constant to compiled code: only here
            by_place = f"({D},), ({B}, {D}) or ({B}, F, {D}) where F divides T = {T}"
            wanted = by_place if rows is None else f"(R, {D}) or ({D},) with rows"
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(vector.shape)}")


def check_rows(rows: Tensor | None, x: Tensor) -> None:
    if rows is None:
        return
    check_integers("rows", rows, "x", x)
    if rows.shape != x.shape[:2]:
        raise ValueError(f"rows must have x's leading shape {tuple(x.shape[:2])}, got {tuple(rows.shape)}")


def check_visibility(key_lengths: Tensor | None, cu_seqlens: Tensor | None, x: Tensor) -> None:
    if key_lengths is not None:
        if cu_seqlens is not None:
            raise ValueError("key_lengths must be None with cu_seqlens, which bounds the keys already")
        check_integers("key_lengths", key_lengths, "x", x)
        if key_lengths.shape != x.shape[:1]:
            raise ValueError(f"key_lengths must be ({x.shape[0]},), a number for each sample, got shape {tuple(key_lengths.shape)}")
    if cu_seqlens is not None:
        check_integers("cu_seqlens", cu_seqlens, "x", x)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens must be (C + 1,), got shape {tuple(cu_seqlens.shape)}")
        if x.shape[0] != 1:
            raise ValueError(f"x must be (1, N, D) with cu_seqlens, a batch packed into one sample, got shape {tuple(x.shape)}")


def check_qk_norm(
    x: Tensor,
    head_dim: int,
    norm: str | None,
    eps: float,
    affine: tuple[Tensor | None, ...],
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    if norm is not None:
        check_choice("qk_norm", norm, NORMS)
    check_eps("qk_eps", eps)
    for name, parameter in zip(("q_weight", "k_weight", "q_bias", "k_bias"), affine, strict=True):
        if parameter is None:
            continue
        check_floats(name, parameter)
        check_device(name, parameter, "x", x)
        if norm is None:
            raise ValueError(f"{name} needs qk_norm, got qk_norm=None")
        if parameter.dim() != 1 or parameter.shape[0] != head_dim:
            raise ValueError(f"{name} must be ({head_dim},), shared by the heads, got shape {tuple(parameter.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'} must be given where the other is, got None")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        check_floats(name, table)
        check_device(name, table, "x", x)
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, as it gets none: pass {name}.detach()")
        fits = table.dim() in (2, 3) and table.shape[-2] == x.shape[1] and 2 <= 2 * table.shape[-1] <= head_dim
        if not fits or (table.dim() == 3 and table.shape[0] != x.shape[0]):
            B, T, P = *x.shape[:2], head_dim // 2
            raise ValueError(f"{name} must be ({T}, P) or ({B}, {T}, P) with P from 1 to {P}, got shape {tuple(table.shape)}")
    if cos is not None and sin is not None and (sin.shape != cos.shape or sin.dtype != cos.dtype):
        raise ValueError(f"sin must be as cos is, {tuple(cos.shape)} {cos.dtype}, got {tuple(sin.shape)} {sin.dtype}")


def check_affine(x: Tensor, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if parameter is not None:
            check_floats(name, parameter)
            check_device(name, parameter, "x", x)
            if parameter.shape != x.shape[-1:]:
                raise ValueError(f"{name} must be ({x.shape[-1]},), got shape {tuple(parameter.shape)}")


def check_projection(name: str, weight: Tensor, bias: Tensor | None, shape: tuple[int, int], like: Tensor, x: Tensor) -> None:
    """Of ``<name>_weight`` and ``<name>_bias``; `like` has the dtype of all projections."""
    check_floats(f"{name}_weight", weight)
    for suffix, tensor, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != like.dtype:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name}_{suffix} must have the other projections' dtype {like.dtype}, got {got}")
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}_{suffix} must be {wanted}, got shape {tuple(tensor.shape)}")
        check_device(f"{name}_{suffix}", tensor, "x", x)


def check_heads(num_heads: int, qkv_weight: Tensor) -> int:
    """The width of all heads together, H head_dim."""
    check_floats("qkv_weight", qkv_weight)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    out = qkv_weight.shape[0] if qkv_weight.dim() == 2 else 0
    head_dim = out // (3 * num_heads) if num_heads > 0 else 0
    if out == 0 or out != 3 * num_heads * head_dim or head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"num_heads must split the rows of qkv_weight {tuple(qkv_weight.shape)} into 3 x num_heads heads of a multiple of 8"
            f" channels, up to 256, got {num_heads}"
        )
    return num_heads * head_dim


def check_split(hidden_size: int, num_heads: int) -> None:
    if num_heads < 1 or hidden_size % (8 * num_heads) or hidden_size > 256 * num_heads:
        heads = "heads of a multiple of 8 channels, up to 256"
        raise ValueError(f"num_heads must divide hidden_size = {hidden_size} into {heads}, got {num_heads}")


def hidden_width(fc1_weight: Tensor, activation: str) -> int:
    """M: what the activation gives."""
    check_choice("activation", activation, ACTIVATIONS)
    check_floats("fc1_weight", fc1_weight)
    out = fc1_weight.shape[0] if fc1_weight.dim() == 2 else 0
    if out == 0 or (activation == "swiglu" and out % 2):
        raise ValueError(f"fc1_weight must be ({'2 M' if activation == 'swiglu' else 'M'}, D), got shape {tuple(fc1_weight.shape)}")
    return out // 2 if activation == "swiglu" else out
