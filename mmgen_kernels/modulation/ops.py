"""The public functions of the family: what they compute, their schemas and fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import NORMS, check_choice, check_eps
from mmgen_kernels.modulation import reference
from mmgen_kernels.modulation.checks import (
    FAMILY,
    addressed,
    as_tokens,
    check_affine,
    check_rows,
    check_table,
    check_x,
    check_y,
    one_or_two,
    output_dtype,
)

GATE_FNS = ("identity", "tanh", "sigmoid_one_minus")
Vector = Tensor | Sequence[Tensor | None] | None


def adaln(
    x: Tensor,
    shift: Vector,
    scale: Vector,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    table: Tensor | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Adaptive normalization of DiT blocks: norm, affine and modulation in one pass over x.

    ``adaln(x) = n(x) * (1 + scale) + shift`` with ``n(x) = weight * (x - mean) / sqrt(var + eps) + bias`` (norm "layer": mean and
    biased variance over D) or ``n(x) = weight * x / sqrt(mean(x^2) + eps) + bias`` ("rms"). Two scales and shifts give two
    outputs of one norm.

    A modulation vector says by its shape which tokens it is for: ``(D,)`` all; ``(B, D)`` those of a sample; ``(B, F, D)`` those of
    a frame, F of equal length to a sample (F = T: each token has its own); with `rows`, ``(R, D)``: token t takes row
    ``rows[t]``. Views with any strides but the last, as ``chunk(6, dim=1)`` makes them, are read in place.

    Args:
        x: (B, T, D); (N, D) and (B, ..., D) are taken as well. fp64, fp32, bf16 or fp16; D >= 1.
        shift, scale: modulation vectors, of any of these dtypes; None is none. Sequences of two give two outputs.
        norm: "layer" or "rms".
        weight, bias: (D,).
        eps: added to the variance.
        table: (V, D), added in registers: a row for each vector given, in the order shift, scale, shift_2, scale_2
            (PixArt's and Wan's ``scale_shift_table``).
        rows: int32 or int64, x's leading sizes; an index out of range is clamped.
        dtype: of the result; by default x's, under autocast the autocast dtype (fp64 stays fp64).

    Returns:
        The modulated tensor, of x's shape and contiguous; a tuple of two for sequences. Statistics and arithmetic are fp32 (fp64
        for fp64 x), with one rounding at the end. Differentiable once, in every tensor; the gradients of vectors are summed in
        a fixed order: the same bits in every run and, for a vector that belongs to a sample, in any batch.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a NaN or Inf in a token makes that token NaN and no other; rms, as arithmetic has it, leaves 0 (and then the shift) of the
        finite numbers beside an Inf.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, section 3.2; Perez et al., FiLM, 2017.
    """
    check_x(x)
    check_choice("norm", norm, NORMS)
    check_eps("eps", eps)
    tokens = as_tokens(x, rows)
    several, pairs = one_or_two(shift, scale)
    vectors = addressed(pairs, tokens, x, rows)
    check_affine(tokens, weight=weight, bias=bias)
    check_table(table, vectors, tokens)
    implementation = backends.choose(ADALN, FAMILY, x.device.type)
    first, second, _ = ADALN(
        implementation, tokens, *vectors, weight, bias, table, check_rows(rows, tokens, x), norm, float(eps), output_dtype(x, dtype)
    )
    return (shaped(first, x), shaped(second, x)) if several else shaped(first, x)


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    *,
    gate_fn: str = "identity",
    post_norm: str | None = None,
    post_weight: Tensor | None = None,
    post_eps: float = 1e-6,
    table: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The gated residual of DiT blocks in one pass.

    ``x + g(gate) * p(y)``, where g is the identity, tanh, or sigmoid(1 - gate) ("sigmoid_one_minus"), and p the identity or, with
    `post_norm`, ``post_weight * norm(y)``: the sandwich norm of Lumina and Mochi.

    Args:
        x: the residual stream, as in `adaln`.
        y: the sub-block's output, of x's shape; its dtype may differ.
        gate: modulation vector, as in `adaln`; None is 1.
        gate_fn: "identity", "tanh" or "sigmoid_one_minus".
        post_norm: None, "layer" or "rms".
        post_weight: (D,), with post_norm only.
        post_eps: added to the variance of y.
        table: (1, D), added to the gate.
        rows: as in `adaln`.

    Returns:
        Contiguous, of x's shape and dtype, autocast or not. Differentiable once, in every tensor.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: as arithmetic has it; with post_norm a NaN or Inf in a token of y spoils that token as in `adaln`.

    Source: Peebles and Xie 2022, section 3.2 (adaLN-Zero); tanh and post norm: Gao et al., Lumina-T2X, 2024.
    """
    check_update(x, y, gate_fn, post_norm, post_weight, post_eps)
    tokens = as_tokens(x, rows)
    vectors = addressed({"gate": gate}, tokens, x, rows)
    check_affine(tokens, post_weight=post_weight)
    check_table(table, vectors, tokens)
    implementation = backends.choose(GATE_RESIDUAL, FAMILY, x.device.type)
    residual = GATE_RESIDUAL(
        implementation, tokens, shaped(y, tokens), *vectors, post_weight, table,
        check_rows(rows, tokens, x), gate_fn, post_norm, float(post_eps),
    )[0]  # fmt: skip
    return shaped(residual, x)


def gate_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Vector,
    scale: Vector,
    *,
    gate_fn: str = "identity",
    post_norm: str | None = None,
    post_weight: Tensor | None = None,
    post_eps: float = 1e-6,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    table: Tensor | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Any]:
    """The seam between two sub-blocks in one pass: reads x and y, writes the residual and the modulated output.

    ``residual = gate_residual(x, y, gate)``, ``modulated = adaln(residual, shift, scale)``: bit for bit what the two functions give
    one after the other.

    Args:
        x, y, gate, gate_fn, post_norm, post_weight, post_eps: as in `gate_residual`.
        shift, scale, norm, weight, bias, eps, rows, dtype: as in `adaln`.
        table: (V, D): a row for each vector given, in the order gate, shift, scale, shift_2, scale_2.

    Returns:
        (residual, modulated); modulated is a tuple of two where shift and scale are sequences.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a NaN or Inf in a token spoils that token's modulated output as in `adaln`, and no other.

    Source: Peebles and Xie 2022, section 3.2.
    """
    check_update(x, y, gate_fn, post_norm, post_weight, post_eps)
    check_choice("norm", norm, NORMS)
    check_eps("eps", eps)
    tokens = as_tokens(x, rows)
    several, pairs = one_or_two(shift, scale)
    vectors = addressed({"gate": gate} | pairs, tokens, x, rows)
    check_affine(tokens, weight=weight, bias=bias, post_weight=post_weight)
    check_table(table, vectors, tokens)
    implementation = backends.choose(GATE_RESIDUAL_ADALN, FAMILY, x.device.type)
    residual, first, second, _, _ = GATE_RESIDUAL_ADALN(
        implementation, tokens, shaped(y, tokens), *vectors, weight, bias,
        post_weight, table, check_rows(rows, tokens, x), gate_fn, post_norm, float(post_eps), norm, float(eps),
        output_dtype(x, dtype),
    )  # fmt: skip
    return shaped(residual, x), (shaped(first, x), shaped(second, x)) if several else shaped(first, x)


def shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """In the shape of `like`, which counts tokens otherwise at most. A view costs 2 us, so there is none where none is due."""
    return tensor if tensor.dim() == like.dim() == 3 else tensor.reshape(like.shape)


def check_update(
    x: Tensor, y: Tensor, gate_fn: str, post_norm: str | None, post_weight: Tensor | None, post_eps: float
) -> None:
    check_x(x)
    check_y(y, x)
    check_choice("gate_fn", gate_fn, GATE_FNS)
    check_eps("post_eps", post_eps)
    if post_norm is not None:
        check_choice("post_norm", post_norm, NORMS)
    elif post_weight is not None:
        raise ValueError("post_weight needs post_norm, got post_norm=None")


# -- registration -----------------------------------------------------------------------------------------------------

# Of outputs that nobody asked for, and of gradients that nobody needs, an empty tensor stands in the results.


def statistics_of(x: Tensor, wide: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], 2), dtype=wide)


def adaln_fake(x, shift, scale, shift_2, scale_2, weight, bias, table, rows, norm, eps, dtype):
    second = (0,) if shift_2 is None and scale_2 is None else x.shape
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(second, dtype=dtype), statistics_of(x, reference.wide_dtype(x))


def gate_residual_fake(x, y, gate, post_weight, table, rows, gate_fn, post_norm, post_eps):
    wide = reference.wide_dtype(x)
    return x.new_empty(x.shape), y.new_empty(0, dtype=wide) if post_norm is None else statistics_of(y, wide)


def gate_residual_adaln_fake(
    x, y, gate, shift, scale, shift_2, scale_2, weight, bias, post_weight, table, rows,
    gate_fn, post_norm, post_eps, norm, eps, dtype,
):  # fmt: skip
    residual, post_statistics = gate_residual_fake(x, y, gate, post_weight, table, rows, gate_fn, post_norm, post_eps)
    outputs = adaln_fake(residual, shift, scale, shift_2, scale_2, weight, bias, table, rows, norm, eps, dtype)
    return residual, *outputs, post_statistics


def gradients_fake(like: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        like.new_empty(of.shape, dtype=of.dtype) if need and of is not None else like.new_empty(0)
        for of, need in zip(inputs, needs, strict=True)
    )


def adaln_backward_fake(
    grad_modulated, grad_modulated_2, x, statistics, shift, scale, shift_2, scale_2, weight, bias, table, rows, norm, *needs
):
    return gradients_fake(x, (x, shift, scale, shift_2, scale_2, weight, bias, table), needs)


def gate_residual_backward_fake(
    grad_residual, y, post_statistics, gate, post_weight, table, rows, gate_fn, post_norm, *needs
):
    return gradients_fake(y, (y, gate, post_weight, table), needs)


def gate_residual_adaln_backward_fake(
    grad_residual, grad_modulated, grad_modulated_2, y, residual, statistics, post_statistics,
    gate, shift, scale, shift_2, scale_2, weight, bias, post_weight, table, rows, gate_fn, post_norm, norm, *needs,
):  # fmt: skip
    inputs = (residual, y, gate, shift, scale, shift_2, scale_2, weight, bias, post_weight, table)
    return gradients_fake(residual, inputs, needs)


def launchers(name: str) -> dict[str, tuple[str, str] | str]:
    module = "mmgen_kernels.modulation.triton_kernels"
    return {"triton": (f"{module}:{name}", f"{module}:{name}_backward")}


NORM_VECTORS = "Tensor? shift, Tensor? scale, Tensor? shift_2, Tensor? scale_2, Tensor? weight, Tensor? bias"

ADALN = library.define(
    f"adaln(Tensor x, {NORM_VECTORS}, Tensor? table, Tensor? rows, str norm, float eps, ScalarType dtype)"
    " -> (Tensor modulated, Tensor modulated_2, Tensor statistics)",
    reference=reference.adaln,
    fake=adaln_fake,
    backward=f"adaln_backward(Tensor? grad_modulated, Tensor? grad_modulated_2, Tensor x, Tensor statistics, {NORM_VECTORS},"
    " Tensor? table, Tensor? rows, str norm, bool need_grad_x, bool need_grad_shift, bool need_grad_scale, bool need_grad_shift_2,"
    " bool need_grad_scale_2, bool need_grad_weight, bool need_grad_bias, bool need_grad_table)"
    " -> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale, Tensor grad_shift_2, Tensor grad_scale_2, Tensor grad_weight,"
    " Tensor grad_bias, Tensor grad_table)",
    backward_reference=reference.adaln_backward,
    backward_fake=adaln_backward_fake,
    launchers=launchers("adaln"),
)

GATE_RESIDUAL = library.define(
    "gate_residual(Tensor x, Tensor y, Tensor? gate, Tensor? post_weight, Tensor? table, Tensor? rows, str gate_fn,"
    " str? post_norm, float post_eps) -> (Tensor residual, Tensor post_statistics)",
    reference=reference.gate_residual,
    fake=gate_residual_fake,
    backward="gate_residual_backward(Tensor? grad_residual, Tensor y, Tensor post_statistics, Tensor? gate, Tensor? post_weight,"
    " Tensor? table, Tensor? rows, str gate_fn, str? post_norm, bool need_grad_y, bool need_grad_gate,"
    " bool need_grad_post_weight, bool need_grad_table)"
    " -> (Tensor grad_y, Tensor grad_gate, Tensor grad_post_weight, Tensor grad_table)",
    backward_reference=reference.gate_residual_backward,
    backward_fake=gate_residual_backward_fake,
    passed_on={"x": "residual"},
    launchers=launchers("gate_residual"),
)

GATE_RESIDUAL_ADALN = library.define(
    f"gate_residual_adaln(Tensor x, Tensor y, Tensor? gate, {NORM_VECTORS}, Tensor? post_weight, Tensor? table, Tensor? rows,"
    " str gate_fn, str? post_norm, float post_eps, str norm, float eps, ScalarType dtype)"
    " -> (Tensor residual, Tensor modulated, Tensor modulated_2, Tensor statistics, Tensor post_statistics)",
    reference=reference.gate_residual_adaln,
    fake=gate_residual_adaln_fake,
    backward="gate_residual_adaln_backward(Tensor? grad_residual, Tensor? grad_modulated, Tensor? grad_modulated_2, Tensor y,"
    f" Tensor residual, Tensor statistics, Tensor post_statistics, Tensor? gate, {NORM_VECTORS}, Tensor? post_weight,"
    " Tensor? table, Tensor? rows, str gate_fn, str? post_norm, str norm, bool need_grad_x, bool need_grad_y, bool need_grad_gate,"
    " bool need_grad_shift, bool need_grad_scale, bool need_grad_shift_2, bool need_grad_scale_2, bool need_grad_weight,"
    " bool need_grad_bias, bool need_grad_post_weight, bool need_grad_table)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_gate, Tensor grad_shift, Tensor grad_scale, Tensor grad_shift_2,"
    " Tensor grad_scale_2, Tensor grad_weight, Tensor grad_bias, Tensor grad_post_weight, Tensor grad_table)",
    backward_reference=reference.gate_residual_adaln_backward,
    backward_fake=gate_residual_adaln_backward_fake,
    launchers=launchers("gate_residual_adaln"),
)
