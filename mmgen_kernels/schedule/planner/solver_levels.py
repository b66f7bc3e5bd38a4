"""Levels of the solvers whose steps are in lambda = log(alpha / sigma), and what a model's output says of the data there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner import conversion, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Run
from mmgen_kernels.schedule.planner.floats import log, sqrt
from mmgen_kernels.schedule.planner.forms import Form

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


class Level:
    """sample = alpha x0 + sigma noise at a level, and lambda = log(alpha / sigma)."""

    def __init__(self, level: float, flow: bool) -> None:
        self.level = level
        self.alpha = 1 - level if flow else 1 / sqrt(level**2 + 1)
        self.sigma = level if flow else level * self.alpha
        self.log_snr = log(self.alpha) - log(self.sigma)


def original(config: Config, at: Level) -> Form:
    """x0. diffusers takes the level itself for a flow prediction's sigma, with levels of another process too."""
    kind = config["prediction_type"]
    return conversion.original(kind, at.alpha, at.level if kind == "flow_prediction" else at.sigma, PREDICTIONS)


def clipped(config: Config, alphas_cumprod: Tensor) -> int:
    """How many of the last training timesteps lambda_min_clipped leaves out."""
    log_snr = torch.log(torch.sqrt(alphas_cumprod)) - torch.log(torch.sqrt(1 - alphas_cumprod))
    return int(torch.searchsorted(log_snr.flip(0), config["lambda_min_clipped"]).item())


def flow_shift(config: Config, run: Run) -> float:
    if run.mu is None:
        return config["flow_shift"]
    if not config["use_dynamic_shifting"] or config["time_shift_type"] != "exponential":
        raise ValueError(f"mu is taken where use_dynamic_shifting is set and time_shift_type is exponential, got {run.mu}")
    return math.exp(run.mu)


def flow(config: Config, steps: int, shift: float) -> tuple[list[float], list[float]]:
    """Levels without the last one, and timesteps."""
    n = config["num_train_timesteps"]
    even = [1.0 - alpha for alpha in spacing.linspace(1, 1 / n, steps + 1)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in even][:0:-1]
    return sigmas, [s * n for s in sigmas]


def spaced(
    config: Config, steps: int, times: list[float], table: list[float], shift: float
) -> tuple[list[float], list[float], bool]:
    """Levels without the last one, timesteps, and whether the levels are others than those of training at the given times."""
    respaced = sigma_space.respaced(config, table[-1], table[0], steps)
    if respaced is not None:
        found = sigma_space.times_of(respaced, sigma_space.logs(table))
        return respaced, [round(t) for t in found] if config["use_karras_sigmas"] else found, True
    if config["use_flow_sigmas"]:
        return *flow(config, steps, shift), True
    return sigma_space.interpolate(times, table), times, False
