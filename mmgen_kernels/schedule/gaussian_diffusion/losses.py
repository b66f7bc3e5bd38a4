"""The losses of a process, per sample, by `mk.hybrid_loss` and `mk.diffusion_loss`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmgen_kernels.schedule.gaussian_diffusion.kinds import LossType, ModelMeanType
from mmgen_kernels.schedule.gaussian_diffusion.steps import Process
from mmgen_kernels.schedule.ops import diffusion_loss, hybrid_loss


def training(
    process: Process, kind: LossType, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """"loss" (B,), and "mse" and "vb" where there are two terms."""
    table, T = process.tables.on(x_t.device, "hybrid"), len(process.tables)
    if kind.is_vb():
        weight = T if kind is LossType.RESCALED_KL else 1.0
        return {"loss": hybrid_loss(output, x_start, noise, t, table=table, vb_weight=weight, objective="kl").vb}
    if process.tables.variance.learned:
        weight = T / 1000 if kind is LossType.RESCALED_MSE else 1.0
        found = hybrid_loss(output, x_start, noise, t, table=table, vb_weight=weight)
        return {"vb": found.vb, "mse": found.mse, "loss": found.loss}
    loss = diffusion_loss(output, target(process, x_start, x_t, t, noise), reduction="none")
    return {"mse": loss, "loss": loss}


def target(process: Process, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict."""
    if process.tables.mean is ModelMeanType.PREVIOUS_X:
        return process.step(process.tables, ("posterior_means",), [x_t, x_start], t, outputs=1)[0]
    return noise if process.tables.mean is ModelMeanType.EPSILON else x_start


def bpd_terms(
    process: Process, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, clip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound's, in bits per dimension, and the mean squares of the errors of x_0 and of the noise, (B,) each."""
    clamp, (m, _) = 1.0 if clip else None, process.split(x_t, output)
    vb = hybrid_loss(output, x_start, noise, t, table=process.tables.on(x_t.device, "hybrid"), objective="kl", clamp=clamp).vb
    (clean,) = process.step(process.tables, ("prediction",), [x_t, m], t, outputs=1, clamp=clamp)
    (epsilon,) = process.step(process.tables, ("noise_by_data",), [x_t, clean], t, outputs=1)
    return vb, diffusion_loss(clean, x_start, reduction="none"), diffusion_loss(epsilon, noise, reduction="none")


def prior_bpd(of_last: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, (B,), of q's mean, variance and its logarithm."""
    mean, variance, log_variance = of_last
    nats = (torch.addcmul(variance, mean, mean) - log_variance - 1) / 2
    return nats.flatten(1).mean(1) / math.log(2)
