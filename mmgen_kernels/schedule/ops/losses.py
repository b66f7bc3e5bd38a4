"""The losses that diffusion models are trained by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_choice, check_floats
from mmgen_kernels.schedule import reference
from mmgen_kernels.schedule.ops.checks import (
    FAMILY,
    check_alike,
    check_finite,
    check_hybrid,
    check_mask,
    check_of_samples,
    check_positive,
)
from mmgen_kernels.schedule.ops.steps import launchers

KINDS = ("mse", "huber", "smooth_l1", "pseudo_huber")
REDUCTIONS = ("mean", "none")
OBJECTIVES = ("hybrid", "kl")


def diffusion_loss(
    output: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    kind: str = "mse",
    delta: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The weighted loss of a batch: ``mean_b(weight_b mean_i(rho(output_bi - target_bi)))``, in one pass.

    rho of a difference d: mse ``d^2``; huber ``d^2 / 2`` where ``|d| <= delta``, else ``delta (|d| - delta / 2)``; smooth_l1 is
    huber divided by delta; pseudo_huber ``sqrt(d^2 + delta^2) - delta``.

    Args:
        output: (B, ...), fp64, fp32, bf16 or fp16. Dense samples are read where they are; others are copied once.
        target: like output; its dtype may differ.
        weight: (B,) or (B, 1, ..., 1), a float per sample, of `loss_weight` say. None: 1.
        kind: mse, huber, smooth_l1 or pseudo_huber.
        delta: a number above 0, or one per sample, (B,); those of a tensor count as at least 2^-126.
        mask: bool, broadcastable to output with as many dimensions, True = valid. The mean of a sample is that of its valid
            elements, 0 where there are none. What is masked is not looked at.
        reduction: "mean" over the batch, or "none" for a loss per sample.

    Returns:
        () or (B,), fp32, or fp64 where output or target is. Differences are made in that type and summed up in fp64 in an order
        that depends on a sample's length alone. Of no samples the mean is NaN. Differentiable once by output, target and weight.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values of tensors never raise.

    NaN: of an element takes the loss of its sample, and of the gradients only its own.

    Source: Ho et al. 2020; Huber 1964; Charbonnier et al. 1997 (pseudo_huber); Hang et al. 2023 (the place of the weight).
    """
    check_floats("output", output)
    if output.dim() == 0:
        raise ValueError("output must be (B, ...), got a scalar")
    check_alike("target", target, "output", output)
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    deltas = None
    if isinstance(delta, Tensor):
        deltas, delta = check_of_samples("delta", delta, output), 1.0
        if deltas.requires_grad and torch.is_grad_enabled():
            raise ValueError("delta has no derivative here: detach it")
    else:
        check_positive("delta", delta)
    if weight is not None:
        weight = check_of_samples("weight", weight, output)
    if mask is not None:
        check_mask(mask, output)
    implementation = backends.choose(DIFFUSION_LOSS, FAMILY, output.device.type)
    return DIFFUSION_LOSS(implementation, output, target, weight, mask, deltas, kind, float(delta), reduction == "mean")[0]


class HybridLoss(NamedTuple):
    """What `hybrid_loss` returns, each (B,): fp32, or fp64 where a tensor of the call is."""

    loss: Tensor  # mse + vb, or vb alone
    mse: Tensor  # of the prediction
    vb: Tensor  # the term of the variational bound in bits, times vb_weight


def hybrid_loss(
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    table: Tensor,
    vb_weight: float = 1.0,
    objective: str = "hybrid",
    clamp: float | None = None,
) -> HybridLoss:
    """The loss of models that learn their variance: mean squared error plus the term of the variational bound, in one pass.

    With p the prediction and v the rest of the output, y its target (of x0 and noise), mu and mu' the means of
    q(x_{t-1} | x_t, x0) and of the model, l = log B~_t (its first value clipped) and l' the logarithm of the model's variance,
    ``mse = mean((y - p)^2)`` and ``vb = vb_weight mean(term) / ln 2``, where

        term = (l' - l - 1 + e^(l - l') + (mu - mu')^2 e^(-l')) / 2                                           for t > 0
        term = -log max(P(x0 + 1/255) - P(x0 - 1/255), 1e-12)                                                 for t = 0

    P is the cumulative distribution of the model's normal, by ``(1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2`` of the u-th
    deviation, and 0 below the least and 1 above the greatest level of 8-bit data in [-1, 1].

    Args:
        output: (B, 2 C, ...), the prediction and v; or (B, C, ...) where the table's variance is fixed. fp64, fp32, bf16 or fp16.
            Dense samples are read where they are; others are copied once.
        x0, noise: (B, C, ...), what x_t was made of. Their dtypes may differ from output's.
        t: (B,), int64 or int32, rows of the table, clamped into it. Row 0 is the one that decodes.
        table: (T, 7), fp64, of `hybrid_table`, on output's device.
        vb_weight: 1 for OpenAI's MSE and KL, T / 1000 for RESCALED_MSE, T for RESCALED_KL.
        objective: "hybrid", loss = mse + vb, and the bound moves v alone, not the prediction; "kl", loss = vb, which moves both.
        clamp: the x0 that the prediction stands for is clipped to [-clamp, clamp] in vb.

    Returns:
        HybridLoss(loss, mse, vb). The means' difference is formed from y - p, not from two means that nearly cancel; sums are made
        in fp64 in an order that depends on a sample's length alone. Differentiable once by output.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes, x0 or noise that want a gradient included.
            Values of tensors never raise.

    NaN: of an element takes its sample's losses, and of the gradient what is made of it. What a share of 0 in the target
        multiplies is not looked at, but for x0 where t = 0 or where there is a clamp.

    Source: Ho et al. 2020, equations 5 to 13; Nichol and Dhariwal 2021, equations 15 and 16, section 3.1.
    """
    check_floats("output", output)
    check_hybrid(output, x0, noise, t, table)
    check_choice("objective", objective, OBJECTIVES)
    check_finite("vb_weight", vb_weight)
    if clamp is not None:
        check_positive("clamp", clamp)
    implementation = backends.choose(HYBRID_LOSS, FAMILY, output.device.type)
    return HybridLoss(*HYBRID_LOSS(implementation, output, x0, noise, t.long(), table, float(vb_weight), objective == "kl", clamp))


# -- registration -----------------------------------------------------------------------------------------------------


def diffusion_loss_fake(output, target, weight, mask, deltas, kind, delta, mean):
    dtype, B = reference.computed_in(output, target), output.shape[0]
    return output.new_empty(() if mean else (B,), dtype=dtype), output.new_empty((B,), dtype=torch.float64)


def diffusion_loss_backward_fake(
    grad_loss, grad_means, output, target, weight, mask, deltas, means, kind, delta, mean, need_output, need_target, need_weight
):
    of_weight = weight.new_empty(weight.shape) if need_weight and weight is not None else output.new_empty(0)
    pairs = ((output, need_output), (target, need_target))
    return (*[t.new_empty(t.shape if need else 0) for t, need in pairs], of_weight)


DIFFUSION_LOSS = library.define(
    "diffusion_loss(Tensor output, Tensor target, Tensor? weight, Tensor? mask, Tensor? deltas, str kind, float delta, bool mean)"
    " -> (Tensor loss, Tensor means)",
    reference=reference.diffusion_loss,
    fake=diffusion_loss_fake,
    backward="diffusion_loss_backward(Tensor? grad_loss, Tensor? grad_means, Tensor output, Tensor target, Tensor? weight,"
    " Tensor? mask, Tensor? deltas, Tensor means, str kind, float delta, bool mean, bool need_grad_output, bool need_grad_target,"
    " bool need_grad_weight) -> (Tensor grad_output, Tensor grad_target, Tensor grad_weight)",
    backward_reference=reference.diffusion_loss_backward,
    backward_fake=diffusion_loss_backward_fake,
    launchers=launchers("diffusion_loss"),
)

HYBRID_LOSS = library.define(
    "hybrid_loss(Tensor output, Tensor x0, Tensor noise, Tensor t, Tensor table, float vb_weight, bool kl, float? clamp)"
    " -> (Tensor loss, Tensor mse, Tensor vb)",
    reference=reference.hybrid_loss,
    fake=lambda output, x0, noise, *rest: tuple(
        output.new_empty(output.shape[:1], dtype=reference.computed_in(output, x0, noise)) for _ in range(3)
    ),
    backward="hybrid_loss_backward(Tensor? grad_loss, Tensor? grad_mse, Tensor? grad_vb, Tensor output, Tensor x0, Tensor noise,"
    " Tensor t, Tensor table, float vb_weight, bool kl, float? clamp) -> Tensor grad_output",
    backward_reference=reference.hybrid_loss_backward,
    backward_fake=lambda grad_loss, grad_mse, grad_vb, output, *rest: output.new_empty(output.shape),
    launchers=launchers("hybrid_loss"),
)
