"""
Levels and preconditioning of Karras et al. 2022: the network F sees c_in x and c_noise = log(s) / 4, and

    x0 = c_skip x + c_out F        c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), c_in = 1 / sqrt(s^2 + d^2)

where d is sigma_data, with c_out below 0 for a v_prediction. Levels are made by the operations of torch that diffusers makes them
by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner import conversion
from mmgen_kernels.schedule.planner.contract import Config, Schedule
from mmgen_kernels.schedule.planner.floats import f32, sqrt
from mmgen_kernels.schedule.planner.forms import MODEL_OUTPUT, Form
from mmgen_kernels.schedule.planner.sigmas import last_sigma

PREDICTIONS = ("epsilon", "v_prediction")
SCHEDULES = ("karras", "exponential")


def schedule(config: Config, ramp: Tensor, least: float | None = None) -> Schedule:
    """
    Levels at the places of `ramp`, from 0 at sigma_max to 1 at sigma_min, in its dtype until they are rounded to fp32; and a last
    one, where final_sigmas_type is sigma_min `least`, or the level before it once more.
    """
    kind, lowest, greatest, rho = (config[name] for name in ("sigma_schedule", "sigma_min", "sigma_max", "rho"))
    if kind not in SCHEDULES:
        raise ValueError(f"sigma_schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if kind == "karras":
        start, end = greatest ** (1 / rho), lowest ** (1 / rho)
        sigmas = ((start + ramp * (end - start)) ** rho).float()
    else:
        ends = math.log(lowest), math.log(greatest)
        sigmas = torch.linspace(*ends, len(ramp), dtype=torch.float32, device="cpu").exp().flip(0)
    levels = sigmas.tolist()
    last = f32(last_sigma(config, levels[-1] if least is None else least))
    times = (0.25 * torch.log(sigmas)).tolist()
    return Schedule(tuple(times), "float32", (*levels, last), init_noise_sigma=sqrt(greatest**2 + 1))


def denoised(config: Config, x: Form, sigma: float) -> Form:
    """x0 of a sample x at this level."""
    conversion.check(config["prediction_type"], PREDICTIONS)
    d, power = config["sigma_data"], sigma**2 + config["sigma_data"] ** 2
    out = sigma * d / sqrt(power)
    return (d**2 / power) * x + (out if config["prediction_type"] == "epsilon" else -out) * MODEL_OUTPUT


def scale(config: Config, sigma: float) -> float:
    """c_in"""
    return 1 / sqrt(sigma**2 + config["sigma_data"] ** 2)
