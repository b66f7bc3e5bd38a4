"""The losses of a process in plain PyTorch, per sample.

The bound's terms, in bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 -log p(x_0 | x_1) of data in
256 levels, where the normal distribution function is 0.5 (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))). Ho et al. 2020, equations 5
and 13; Nichol and Dhariwal 2021.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.gaussian_diffusion.kinds import LossType, ModelMeanType
from mmgen_kernels.schedule.gaussian_diffusion.steps import Limits, Process

HALF_LEVEL = 1 / 255
LEAST_PROBABILITY = 1e-12


def training(
    process: Process, kind: LossType, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, m: Tensor, v: Tensor | None
) -> dict[str, Tensor]:
    """"loss" (B,), and "mse" and "vb" where there are two terms."""
    free = Limits(clip=False)
    if kind.is_vb():
        mean, _ = process.means(x_t, m, t, free)
        loss = bound(process, x_start, x_t, t, mean, process.variances(x_t, t, v)[1])
        return {"loss": loss * len(process.tables) if kind is LossType.RESCALED_KL else loss}
    terms = {}
    if v is not None:  # the bound teaches the variance only
        mean, _ = process.means(x_t, m.detach(), t, free)
        terms["vb"] = bound(process, x_start, x_t, t, mean, process.variances(x_t, t, v)[1])
        if kind is LossType.RESCALED_MSE:
            terms["vb"] = terms["vb"] * (len(process.tables) / 1000)
    terms["mse"] = per_sample((target(process, x_start, x_t, t, noise) - m).square())
    terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
    return terms


def target(process: Process, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict."""
    if process.tables.mean is ModelMeanType.PREVIOUS_X:
        return process.step(process.tables, ("posterior_means",), [x_t, x_start], t, outputs=1)[0]
    return noise if process.tables.mean is ModelMeanType.EPSILON else x_start


def bound(process: Process, x_start: Tensor, x_t: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Its terms of t, (B,)."""
    (true_mean,) = process.step(process.tables, ("posterior_means",), [x_t, x_start], t, outputs=1)
    _, true_log = process.lookup("posterior_variances", t, x_t.dim(), mean.dtype)
    kl = normal_kl(true_mean, true_log, mean, log_variance)
    return torch.where(t == 0, bits(-log_likelihood(x_start, mean, log_variance / 2)), bits(kl))


def normal_kl(mean: Tensor, log_variance: Tensor, of_mean: Any, of_log_variance: Any) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(of_mean, exp(of_log_variance)))"""
    apart = of_log_variance - log_variance
    return (apart - 1 + torch.exp(-apart) + (mean - of_mean).square() * torch.exp(torch.as_tensor(-of_log_variance))) / 2


def log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of levels in [-1, 1]; the first one and the last one reach to infinity."""
    centred, narrow = x - mean, torch.exp(-log_scale)
    above, below = (distribution(narrow * (centred + shift)) for shift in (HALF_LEVEL, -HALF_LEVEL))
    share = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return share.clamp(min=LEAST_PROBABILITY).log()


def distribution(u: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) / 2


def bpd_terms(
    process: Process, out: dict[str, Tensor], x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound's, and the mean squares of the errors of x_0 and of the noise, (B,) each."""
    clean = out["pred_xstart"]
    (epsilon,) = process.step(process.tables, ("noise_by_data",), [x_t, clean], t, outputs=1)
    vb = bound(process, x_start, x_t, t, out["mean"], out["log_variance"])
    return vb, per_sample((clean - x_start).square()), per_sample((epsilon - noise).square())


def prior_bpd(of_last: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)), (B,), of q's mean, variance and its logarithm."""
    mean, _, log_variance = of_last
    return bits(normal_kl(mean, log_variance, 0.0, 0.0))


def bits(nats: Tensor) -> Tensor:
    return per_sample(nats) / math.log(2)


def per_sample(t: Tensor) -> Tensor:
    """Means, (B,)."""
    return t.flatten(1).mean(1)
