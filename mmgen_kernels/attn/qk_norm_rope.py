"""qk_norm_rope and the tables it takes: what they compute, the operator's schema and fakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.attn import reference
from mmgen_kernels.attn.checks import FAMILY, check_affine, check_norm, check_qk, check_table


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    norm: str | None = "rms",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    across_heads: bool = False,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalizes queries and keys and turns them by their positions, between the projection and the attention, in one pass.

    ``n(x) = weight * x / sqrt(mean(x^2) + eps) + bias`` ("rms"), or ``weight * (x - mean) / sqrt(var + eps) + bias`` ("layer"),
    over the D channels of each head or over the H D of all. Then each pair (a, b) of the first 2P channels of a head becomes
    ``(a cos - b sin, b cos + a sin)`` with the angle of its token and pair; the rest passes.

    Args:
        q: (B, T, H, D), fp64, fp32, bf16 or fp16. Strides are free but for the last: views of a packed projection are read in
            place.
        k: (B, S, G, D), q's dtype; S = T where there are angles.
        norm: "rms", "layer", or None for the rotation alone.
        q_weight, k_weight, q_bias, k_bias: (D,), across heads (H D,) and (G D,); any float dtype.
        across_heads: one norm for all channels of a token, as Wan and LTX have it.
        eps: added to the variance.
        cos, sin: (T, P) or (B, T, P) with 2P <= D, any float dtype, best fp32, and any strides: a column for each pair.
            `rope_table` makes them. Tokens that are not turned, as the text in FLUX, have cos 1 and sin 0. They have no gradient:
            tables that require one are refused.
        interleaved: pairs are channels (2i, 2i + 1) as in FLUX, Wan and LTX; otherwise (i, i + P), as in LLaMA and GPT-NeoX.

    Returns:
        (q, k) of the same shapes and dtype, contiguous. Differentiable once, in q, k, weights and biases; sums over tokens have a
        fixed order.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    Tables that hold each angle twice are taken as views. Of diffusers' ``get_1d_rotary_pos_embed(use_real=True)``, (T, R), take
    ``cos[:, ::2]`` and ``interleaved=True`` where it repeats neighbours (`repeat_interleave_real`), else ``cos[:, : R // 2]``; of
    complex ``freqs_cis`` its ``.real`` and ``.imag``; of timm's ``RotaryEmbeddingCat.get_embed()``, with ``interleaved=True``,
    ``sin, cos = embed[..., ::2].chunk(2, -1)``. Where angles differ from head to head (LTX), q is one head of all channels:
    ``q.flatten(2).unsqueeze(2)``.

    Under autocast nothing is cast: q and k keep their dtype, and weights and tables are read as they are, in fp32 as a rule.

    NaN: a NaN in a row of the norm (a head's channels, across heads a token's) makes that row NaN; so does an Inf, but that rms
        leaves 0 (and then the bias) of the finite numbers beside it that share no pair with one. Other rows keep their bits.

    Source: Su et al., RoFormer, 2021; Henry et al., Query-Key Normalization for Transformers, 2020.
    """
    check_qk(q, k)
    check_norm(norm, across_heads, eps)
    for name, parameter, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k), ("q_bias", q_bias, q), ("k_bias", k_bias, k)):
        check_affine(name, parameter, x, norm, across_heads)
    check_table(cos, sin, q, k)
    implementation = backends.choose(QK_NORM_ROPE, FAMILY, q.device.type)
    return QK_NORM_ROPE(
        implementation, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, norm, across_heads, float(eps), interleaved
    )


def rope_table(
    positions: Tensor, dims: Sequence[int], theta: float | Sequence[float] = 10000.0, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin for `qk_norm_rope`: the angle of pair i of an axis is ``position * theta^(-2i / dim)``.

    Args:
        positions: (..., T, A), integers or floats: where each token is on each of A axes, such as frame, row and column.
        dims: channels for each axis, even numbers: (16, 56, 56) in FLUX. Their sum is what is turned of a head.
        theta: the base of the frequencies, one for all axes or one each.
        dtype: of the result. Angles and their functions are computed in fp64.

    Returns:
        (cos, sin), (..., T, sum(dims) / 2).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.

    NaN: a NaN or Inf among the positions makes that axis' cos and sin of its token NaN.

    Source: Su et al., RoFormer, 2021, section 3.3; several axes: Heo et al., RoPE for Vision Transformer, 2024.
    """
    if not isinstance(positions, Tensor) or positions.is_complex():
        raise TypeError(f"positions must be a real tensor, got {getattr(positions, 'dtype', type(positions).__name__)}")
    dims = tuple(dims)
    if not dims or any(dim < 2 or dim % 2 for dim in dims):
        raise ValueError(f"dims must be even numbers, one for each axis, got {dims}")
    if positions.dim() < 2 or positions.shape[-1] != len(dims):
        raise ValueError(f"positions must be (..., T, {len(dims)}), a column for each of dims, got shape {tuple(positions.shape)}")
    bases = (theta,) * len(dims) if isinstance(theta, (int, float)) else tuple(theta)
    if len(bases) != len(dims) or any(base <= 0 for base in bases):
        raise ValueError(f"theta must be a positive number or one for each of dims, got {theta}")
    at = positions.double()
    angles = []
    for axis, (dim, base) in enumerate(zip(dims, bases, strict=True)):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=at.device) / dim
        angles.append(at[..., axis, None] * float(base) ** -exponents)  # (..., T, dim / 2)
    angle = torch.cat(angles, -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


# -- registration -----------------------------------------------------------------------------------------------------


def qk_norm_rope_fake(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, norm, across_heads, eps, interleaved):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def qk_norm_rope_backward_fake(
    grad_rotated_q, grad_rotated_k, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, norm, across_heads, eps, interleaved, *needs
):
    return tuple(
        q.new_empty(of.shape, dtype=of.dtype) if need and of is not None else q.new_empty(0)
        for of, need in zip((q, k, q_weight, k_weight, q_bias, k_bias), needs, strict=True)
    )


def qk_norm_rope_vmap(call: Callable, info: Any, in_dims: tuple, *args: Any) -> tuple:
    """A batch of batches is a larger batch, unless it brings weights of its own."""
    if any(isinstance(d, int) for d in in_dims[2:6]):
        return library.vmap_by_loop(QK_NORM_ROPE, call, info, in_dims, *args)
    V, args = info.batch_size, tuple(a.movedim(d, 0) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
    q, k, *affine, cos, sin = args[:8]
    q, k = (t if isinstance(d, int) else t.expand(V, *t.shape) for t, d in zip((q, k), in_dims, strict=False))  # (V, B, T, H, D)
    B = q.shape[1]
    if cos is not None and sin is not None:
        cos, sin = (of_each_sample(t, isinstance(d, int), V, B) for t, d in zip((cos, sin), in_dims[6:8], strict=True))
    rotated = call(q.flatten(0, 1), k.flatten(0, 1), *affine, cos, sin, *args[8:])
    return tuple(t.unflatten(0, (V, B)) for t in rotated), (0, 0)


def of_each_sample(table: Tensor, batched: bool, V: int, B: int) -> Tensor:
    """(V B, T, P) of a table (T, P) or (B, T, P), with V in front if batched."""
    table = table if batched else table.expand(V, *table.shape)
    table = table if table.dim() == 4 else table.unsqueeze(1).expand(-1, B, -1, -1)
    return table.flatten(0, 1)


PARAMETERS = "Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? cos, Tensor? sin"
OPTIONS = "str? norm, bool across_heads, float eps, bool interleaved"

# The backward takes the statistics of a row anew: it reads the row anyway, and the forward writes nothing but its results. Of
# gradients that nobody needs, an empty tensor stands in the results.
QK_NORM_ROPE = library.define(
    f"qk_norm_rope(Tensor q, Tensor k, {PARAMETERS}, {OPTIONS}) -> (Tensor rotated_q, Tensor rotated_k)",
    reference=reference.qk_norm_rope,
    fake=qk_norm_rope_fake,
    backward=f"qk_norm_rope_backward(Tensor? grad_rotated_q, Tensor? grad_rotated_k, Tensor q, Tensor k, {PARAMETERS}, {OPTIONS},"
    " bool need_grad_q, bool need_grad_k, bool need_grad_q_weight, bool need_grad_k_weight, bool need_grad_q_bias,"
    " bool need_grad_k_bias) -> (Tensor grad_q, Tensor grad_k, Tensor grad_q_weight, Tensor grad_k_weight, Tensor grad_q_bias,"
    " Tensor grad_k_bias)",
    backward_reference=reference.qk_norm_rope_backward,
    backward_fake=qk_norm_rope_backward_fake,
    launchers={
        "triton": (
            "mmgen_kernels.attn.triton_kernels:qk_norm_rope",
            "mmgen_kernels.attn.triton_kernels:qk_norm_rope_backward",
        )
    },
    vmap=qk_norm_rope_vmap,
)
