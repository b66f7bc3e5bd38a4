"""How much each timestep counts in the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice, check_floats, check_integers
from mmgen_kernels.schedule.ops.checks import PATHS, check_finite, check_positive
from mmgen_kernels.schedule.reference.steps import weights

KINDS = ("min_snr", "sigma_sqrt", "cosmap", "logit_normal", "edm")
PREDICTIONS = ("epsilon", "sample", "v")


def loss_weight(
    t: Tensor,
    *,
    kind: str = "min_snr",
    prediction: str = "epsilon",
    path: str = "vp",
    table: Tensor | None = None,
    gamma: float = 5.0,
    sigma_data: float = 0.5,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """A weight per sample for `diffusion_loss`, by the sample's timestep. Never waits for the device.

    With SNR = (a / s)^2 of `add_noise`'s path at t, g = gamma, and sigma = t where no path is spoken of:
    min_snr, epsilon ``min(SNR, g) / SNR``, v ``min(SNR, g) / (SNR + 1)``, sample ``min(SNR, g)``;
    sigma_sqrt ``sigma^-2``; cosmap ``2 / (pi (1 - 2 sigma + 2 sigma^2))``;
    logit_normal ``exp(-(logit(sigma) - mean)^2 / (2 std^2)) / (std sqrt(2 pi) sigma (1 - sigma))``, which is a density;
    edm ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``.

    Args:
        t: (B,), or any shape: a float time or noise level; or, of min_snr, an index into `table`, int64 or int32, clamped into it.
        kind: min_snr, sigma_sqrt, cosmap, logit_normal or edm.
        prediction: what the model's output is, of min_snr: epsilon, sample (x0) or v.
        path: of min_snr: vp, linear, gvp or edm, as in `add_noise`.
        table: (S,), fp64 or fp32, alphas_cumprod, on t's device.
        gamma, sigma_data, std: above 0.
        mean: of logit(sigma).

    Returns:
        fp32 of t's shape, computed in fp64. Without a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values of tensors never raise.

    NaN: of a t stays with it. At an SNR of 0 epsilon's weight is 1, at an infinite one 0. logit_normal is 0 at 0 and 1.

    Source: Hang et al. 2023 (min_snr); Salimans and Ho 2022 (v); Esser et al. 2024, section 3.1 (sigma_sqrt, cosmap, logit_normal);
        Karras et al. 2022, table 1 (edm).
    """
    check_choice("kind", kind, KINDS)
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("path", path, PATHS)
    for name, value in (("gamma", gamma), ("sigma_data", sigma_data), ("std", std)):
        check_positive(name, value)
    check_finite("mean", mean)
    if table is None:
        check_floats("t", t)
    else:
        if kind != "min_snr":
            raise ValueError(f"table is of min_snr: give {kind} the noise levels themselves as t")
        check_floats("table", table)
        if table.dim() != 1 or table.shape[0] < 1:
            raise ValueError(f"table must be (S,) with S >= 1, got shape {tuple(table.shape)}")
        check_integers("t", t, "table", table)
    with torch.no_grad():
        if kind == "min_snr":
            found = _min_snr(t, table, path, prediction, gamma)
        else:
            found = _of_sigma(t.double(), kind, sigma_data, mean, std)
        return found.float()


def _min_snr(t: Tensor, table: Tensor | None, path: str, prediction: str, gamma: float) -> Tensor:
    data, noise = weights(t.flatten(), table, path, None, 1)
    snr = (data / noise).square().reshape(t.shape)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction == "sample":
        return snr.clamp(max=gamma)
    return snr.clamp(max=gamma) / (snr + 1)


def _of_sigma(sigma: Tensor, kind: str, sigma_data: float, mean: float, std: float) -> Tensor:
    if kind == "sigma_sqrt":
        return sigma**-2
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    if kind == "edm":
        return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    density = torch.exp(-(torch.logit(sigma) - mean).square() / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * sigma * (1 - sigma))
    return torch.where((sigma <= 0) | (sigma >= 1), 0, density)
