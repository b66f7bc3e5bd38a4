"""residual_quantize: what it computes, its schema and fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_choice, check_device, check_floats, check_number
from mmgen_kernels.vq import reference
from mmgen_kernels.vq.ops.checks import (
    FAMILY,
    METRICS,
    PRECISIONS,
    check_codebook,
    check_gradient,
    check_mask,
)


class RVQOutput(NamedTuple):
    """What `residual_quantize` returns. Statistics of codebooks given as a sequence are lists, one tensor per level."""

    quantized: Tensor  # (..., D), the dtype that x and the codebooks promote to
    indices: Tensor  # (..., L), int64; -1 where masked or dropped
    loss: Tensor  # (L,), codebook loss + beta * commitment loss; fp32, or fp64 if any input is fp64
    counts: Tensor | list[Tensor] | None  # (L, K), int64: rows per code
    sums: Tensor | list[Tensor] | None  # (L, K, D), the loss's dtype: the sum of their residuals


def residual_quantize(
    x: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    *,
    beta: float = 0.25,
    gradient: str = "straight_through",
    metric: str = "l2",
    levels: int | Tensor | None = None,
    mask: Tensor | None = None,
    precision: str = "exact",
    statistics: bool | torch.dtype = False,
) -> RVQOutput:
    """Residual vector quantization as one differentiable operator: each level quantizes what the levels before it left over.

    ``r_0 = x``; at level l ``i_l = nearest_code(r_l, codebooks[l])``, ``q_l = codebooks[l][i_l]``, ``r_{l+1} = r_l - q_l``, all in
    fp32 (fp64 if any input is fp64), one rounding per component. ``quantized = q_0 + q_1 + ..``, added in that order and rounded
    once to its dtype. With M_l rows at level l, ``loss[l] = (1 + beta) sum |r_l - q_l|^2 / (M_l D)``, 0 without any.

    Gradients: of ``quantized`` to x, once for all levels, straight through (``dx = dq``) or by the rotation trick from x to the
    sum; of ``loss[l]`` to x, ``beta 2 (r_l - q_l) / (M_l D)``, the codes of the levels before counting as constants, and to the
    codes of its level, ``2 (q_l - r_l) / (M_l D)``, summed in row order, the same bits in every run. Differentiable once.

    x, the codebooks and the indices are all that is kept for the backward, which computes the residuals again. So codebooks may
    not be written in place before it (torch then raises, as for its own operators): an EMA that updates them in the
    forward passes ``codebooks.clone()`` here, or waits for the backward.

    Args:
        x: (..., D); fp64, fp32, bf16 or fp16; any strides.
        codebooks: (L, K, D), where ``codebook.expand(L, K, D)`` shares one codebook between the levels without copying it; or a
            sequence of L tensors (K_l, D) of any sizes. Same device; dtypes may differ from x's. L >= 1, 1 <= K < 2^31.
        beta: weight of the commitment loss.
        gradient: "straight_through" or "rotation".
        metric, precision: as in `nearest_code`. The metric chooses the index only.
        levels: how many levels to use: None (all), an int in 0..L, or int64 (B,) for x (B, ..., D), one number per sample, clamped
            to 0..L. A level that is not used has index -1, adds nothing and has no share in its loss.
        mask: (...) bool, True = valid. An invalid row has indices -1, quantized 0, gradient 0 and no share in any mean.
        statistics: also returns counts and sums, what an EMA of the codebooks needs; torch.float64 asks for the sums in fp64, to
            add up ranks before they are rounded.

    Returns:
        RVQOutput. ``counts[l, k]`` rows have code k at level l, and ``sums[l, k]`` is the sum of their r_l, in fp64 in row order
        and rounded once; neither is differentiable. Both are None unless ``statistics``.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: where |r_l - q_l|^2 is not finite (NaN or Inf in the row), r_{l+1} is NaN as a whole: from there on the row has index 0
    and makes losses NaN and sums of its codes not finite; its quantized and its gradient are NaN, as is the gradient of its codes.

    Source: Zeghidour et al., SoundStream, 2021; Lee et al., Autoregressive Image Generation using Residual Quantization, 2022.
    """
    joined, sizes = join_codebooks(codebooks)
    num_levels = len(sizes) or joined.shape[0]
    check_floats("x", x)
    if x.dim() < 1 or x.shape[-1] != joined.shape[-1]:
        raise ValueError(f"x must be (..., D) with the codebooks' D = {joined.shape[-1]}, got shape {tuple(x.shape)}")
    check_device("codebooks", joined, "x", x)
    check_mask(mask, x)
    check_gradient(gradient)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    check_number("beta", beta)
    if not isinstance(statistics, bool) and statistics not in (torch.float32, torch.float64):
        got = statistics if isinstance(statistics, torch.dtype) else type(statistics).__name__
        raise TypeError(f"statistics must be a bool, torch.float32 or torch.float64, got {got}")
    if statistics is True:
        statistics = torch.promote_types(torch.promote_types(x.dtype, joined.dtype), torch.float32)
    kept = statistics or None
    depth, per_sample = check_levels(levels, x, num_levels)
    quantized, indices, loss, counts, sums = RESIDUAL_QUANTIZE(
        backends.choose(RESIDUAL_QUANTIZE, FAMILY, x.device.type),
        *(x, joined, sizes, per_sample, mask, depth, float(beta), gradient, metric, precision, kept),
    )
    if kept is None:
        return RVQOutput(quantized, indices, loss, None, None)
    sums = sums.detach()  # the operator has no gradient for them
    if sizes:
        return RVQOutput(quantized, indices, loss, list(counts.split(sizes)), list(sums.split(sizes)))
    return RVQOutput(quantized, indices, loss, counts, sums)


def join_codebooks(codebooks: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """(L, K, D) and no sizes, or (sum of K_l, D) and the sizes K_l."""
    if isinstance(codebooks, Tensor):
        shape = tuple(codebooks.shape)
        if len(shape) != 3 or shape[0] < 1:
            raise ValueError(f"codebooks must be (L, K, D) with L >= 1, or a sequence of (K, D), got shape {shape}")
        check_codebook(codebooks, "codebooks")
        return codebooks, []
    if not isinstance(codebooks, (list, tuple, torch.nn.ParameterList)):
        raise TypeError(f"codebooks must be a tensor or a sequence of tensors, got {type(codebooks).__name__}")
    if len(codebooks) == 0:
        raise ValueError("codebooks must hold at least one level, got an empty sequence")
    for level, book in enumerate(codebooks):
        check_codebook(book, f"codebooks[{level}]")
        if book.dim() != 2 or book.shape[1] != codebooks[0].shape[1]:
            raise ValueError(f"codebooks[{level}] must be (K, {codebooks[0].shape[-1]}), got shape {tuple(book.shape)}")
        check_device(f"codebooks[{level}]", book, "codebooks[0]", codebooks[0])
    return torch.cat(list(codebooks)), [book.shape[0] for book in codebooks]


def check_levels(levels: int | Tensor | None, x: Tensor, num_levels: int) -> tuple[int, Tensor | None]:
    """For the whole batch, and for each sample."""
    if levels is None:
        return num_levels, None
    if isinstance(levels, Tensor):
        if levels.dtype != torch.int64:
            raise TypeError(f"levels must be an int or an int64 tensor, got {levels.dtype}")
        if x.dim() < 2 or levels.shape != x.shape[:1]:
            raise ValueError(f"levels must be (B,) for x (B, ..., D), got {tuple(levels.shape)} for x {tuple(x.shape)}")
        check_device("levels", levels, "x", x)
        return num_levels, levels
    if not isinstance(levels, int) or isinstance(levels, bool):
        raise TypeError(f"levels must be an int or an int64 tensor, got {type(levels).__name__}")
    if not 0 <= levels <= num_levels:
        raise ValueError(f"levels must be in 0..{num_levels}, got {levels}")
    return levels, None


# -- registration -----------------------------------------------------------------------------------------------------


def residual_quantize_fake(x, codebooks, sizes, levels, mask, depth, beta, gradient, metric, precision, statistics):
    dtype = torch.promote_types(x.dtype, codebooks.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    num_levels = codebooks.shape[0] if codebooks.dim() == 3 else len(sizes)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((*x.shape[:-1], num_levels), dtype=torch.int64),
        x.new_empty(num_levels, dtype=wide),
        x.new_empty(codebooks.shape[:-1] if statistics is not None else (0,), dtype=torch.int64),
        x.new_empty(codebooks.shape if statistics is not None else (0,), dtype=statistics or wide),
    )


def residual_quantize_backward_fake(grad_quantized, grad_loss, x, codebooks, *options: Any):
    need_grad_x, need_grad_codebooks = options[-2:]
    return x.new_empty(x.shape if need_grad_x else (0,)), codebooks.new_empty(codebooks.shape if need_grad_codebooks else (0,))


RESIDUAL_QUANTIZE = library.define(
    "residual_quantize(Tensor x, Tensor codebooks, SymInt[] sizes, Tensor? levels, Tensor? mask, SymInt depth, float beta,"
    " str gradient, str metric, str precision, ScalarType? statistics)"
    " -> (Tensor quantized, Tensor indices, Tensor loss, Tensor counts, Tensor sums)",
    reference=reference.residual_quantize,
    fake=residual_quantize_fake,
    backward="residual_quantize_backward(Tensor? grad_quantized, Tensor? grad_loss, Tensor x, Tensor codebooks, Tensor indices,"
    " SymInt[] sizes, float beta, str gradient, bool need_grad_x, bool need_grad_codebooks)"
    " -> (Tensor grad_x, Tensor grad_codebooks)",
    backward_reference=reference.residual_quantize_backward,
    backward_fake=residual_quantize_backward_fake,
    launchers={
        "triton": (
            "mmgen_kernels.vq.triton_kernels:residual_quantize",
            "mmgen_kernels.vq.triton_kernels:residual_quantize_backward",
        )
    },
)
