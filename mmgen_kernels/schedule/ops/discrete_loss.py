"""The loss that discrete diffusions over codes are trained by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_choice, check_device
from mmgen_kernels.schedule.ops.checks import FAMILY, check_finite, check_of_samples
from mmgen_kernels.schedule.ops.discrete import check_codes, check_table, classes_last
from mmgen_kernels.schedule.ops.steps import launchers
from mmgen_kernels.schedule.reference import discrete_loss as reference
from mmgen_kernels.schedule.reference.discrete import ROW, wide_dtype

REDUCTIONS = ("mean", "none", "places")


class VQDiffusionLoss(NamedTuple):
    """What `vq_diffusion_loss` returns: fp32, or fp64 of fp64 logits."""

    loss: Tensor  # (), (B,) or (B, N), as the reduction has it
    vb: Tensor  # (B,), the mean divergence of each sample's places, in nats
    aux: Tensor | None  # (B,), the mean -log p of x0; None where there is no aux_weight


def vq_diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    transitions: Tensor,
    step: int | Tensor,
    *,
    weight: Tensor | None = None,
    aux_weight: float | Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
    reduction: str = "mean",
) -> VQDiffusionLoss:
    """A step's term of the variational bound of discrete diffusion, with no tensor of logits' size but the gradient.

    With ``p = softmax(logits)`` over K codes, the mask being class K, a place's loss is ``vb + aux_weight (-log p_{x0})``, where

        vb = KL( q(x_{t-1} | x_t, x0) || sum_k q(x_{t-1} | x_t, k) p_k )

    is that of the distributions which `vq_diffusion_step` draws from: ``q(m | x_t, k) ~ q(x_t | m) q(m | k)``, of the row's a, b, c
    and A', B', C' (`transition_table`). At the first step of the process vb is ``-log p_{x0}``, as A' = 1. Where x_t can have been
    nothing else before, as a code in absorbing diffusion, it is 0. The batch's loss is ``mean_b(weight_b mean_n(loss_bn))``.

    Args:
        logits: (B, N, K), or (B, K, N) with dim=1, any strides, fp64, fp32, bf16 or fp16; log-probabilities are logits too.
        x0: int64 (B, N), the true codes; clamped to 0 ... K - 1.
        x_t: int64 (B, N), the present codes; clamped to 0 ... K.
        transitions: (steps, 9), fp64; on the CPU where `step` is an int, whatever the logits' device.
        step: which row; an int, or an int64 tensor on logits' device, () or (B,). Its values are clamped into the table: row 0 is
            the first step of the process.
        weight: (B,) or (B, 1), a float per sample: importance, or what makes the sum of a bound. None: 1.
        aux_weight: of the auxiliary term, a number or one per sample, (B,). VQ-Diffusion has 5e-4 (2 - t / T), D3PM 0.001 or 0.01.
            None: there is no such term.
        mask: bool (B, N), True = valid. The mean of a sample is that of its valid places, 0 where there are none.
        dim: of logits, the dimension of the classes: -1 or 1.
        reduction: "mean" over the batch, "none" for a loss per sample, "places" for one per place, weighted, 0 where it is masked.

    Returns:
        VQDiffusionLoss(loss, vb, aux), vb and aux being unweighted means of each sample. Of no samples the mean is NaN. A place's
        bits depend on its own logits, codes and row alone. Differentiable once by logits; the gradient is made in one pass.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes, a weight that wants a gradient included (multiply
            the loss of reduction="none" by it). Values of tensors never raise.

    NaN: the loss of a place whose softmax is not defined (logits with NaN or +Inf, or all -Inf), its gradient and the means that it
        is in. Logits of masked places are not looked at, nor, without aux_weight, those of a code that can have been nothing else.
        A logit of -Inf at x0 has the loss +Inf where B' = 0, and in the auxiliary term.

    Source: Gu et al. 2022 (VQ-Diffusion), section 4; Austin et al. 2021 (D3PM), section 3.4.
    """
    check_codes("x_t", x_t, view := classes_last("logits", logits, dim))
    check_codes("x0", x0, view)
    check_table("transitions", transitions, ROW, step, view)
    check_choice("reduction", reduction, REDUCTIONS)
    if weight is not None:
        weight = constant_of_samples("weight", weight, view)
    aux_weights = None
    if isinstance(aux_weight, Tensor):
        aux_weights, aux_weight = constant_of_samples("aux_weight", aux_weight, view), None
    elif aux_weight is not None:
        check_finite("aux_weight", aux_weight)
        aux_weight = float(aux_weight)
    if mask is not None:
        check_places("mask", mask, view)
    index, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    implementation = backends.choose(VQ_DIFFUSION_LOSS, FAMILY, logits.device.type)
    arguments = (logits, x0, x_t, transitions, index, weight, aux_weights, mask, number, aux_weight, dim == 1, reduction)
    loss, vb, aux, _ = VQ_DIFFUSION_LOSS(implementation, *arguments)
    return VQDiffusionLoss(loss, vb, None if aux_weights is None and aux_weight is None else aux)


# -- checks -----------------------------------------------------------------------------------------------------------


def constant_of_samples(name: str, values: Tensor, logits: Tensor) -> Tensor:
    values = check_of_samples(name, values, logits, "logits")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f'{name} has no derivative here: detach it, or multiply the loss of reduction="none" by it')
    return values


def check_places(name: str, mask: Tensor, logits: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != logits.shape[:2]:
        raise ValueError(f"{name} must be of shape {tuple(logits.shape[:2])}, a bool per place, got {tuple(mask.shape)}")
    check_device(name, mask, "logits", logits)


# -- registration -----------------------------------------------------------------------------------------------------


def vq_diffusion_loss_fake(
    logits, x0, x_t, transitions, index, weight, aux_weights, mask, step, aux_weight, classes_first, reduction
):
    wide, (B, N) = wide_dtype(logits), x_t.shape
    loss = {"mean": (), "none": (B,), "places": (B, N)}[reduction]
    aux = 0 if aux_weight is None and aux_weights is None else B
    return (
        logits.new_empty(loss, dtype=wide),
        logits.new_empty(B, dtype=wide),
        logits.new_empty(aux, dtype=wide),
        logits.new_empty((B, N, 3), dtype=torch.float64),
    )


VQ_DIFFUSION_LOSS = library.define(
    # places (B, N, 3): the largest logit, and over all classes but x0 and x_t the sums of exponentials and of p u / (1 + u)
    "vq_diffusion_loss(Tensor logits, Tensor x0, Tensor x_t, Tensor transitions, Tensor? index, Tensor? weight,"
    " Tensor? aux_weights, Tensor? mask, SymInt step, float? aux_weight, bool classes_first, str reduction)"
    " -> (Tensor loss, Tensor vb, Tensor aux, Tensor places)",
    reference=reference.vq_diffusion_loss,
    fake=vq_diffusion_loss_fake,
    backward="vq_diffusion_loss_backward(Tensor? grad_loss, Tensor? grad_vb, Tensor? grad_aux, Tensor logits, Tensor x0,"
    " Tensor x_t, Tensor transitions, Tensor? index, Tensor? weight, Tensor? aux_weights, Tensor? mask, Tensor places,"
    " SymInt step, float? aux_weight, bool classes_first, str reduction) -> Tensor grad_logits",
    backward_reference=reference.vq_diffusion_loss_backward,
    backward_fake=lambda grad_loss, grad_vb, grad_aux, logits, *rest: logits.new_empty(logits.shape),
    launchers=launchers("vq_diffusion_loss"),
)
