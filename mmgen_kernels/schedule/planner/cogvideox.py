"""
What the two CogVideoX schedulers, Yang et al. 2024, share: DDIM's timesteps, and a training schedule whose signal to noise ratio is
divided by snr_shift_scale c,

    a -> a / (c + (1 - c) a)

before a zero terminal SNR is made, of the levels themselves. diffusers holds "scaled_linear" in fp64 and the other schedules in
fp32; so are they here. The config's clipping is read by no step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner import betas, spacing
from mmgen_kernels.schedule.planner.contract import Config, Run, Schedule
from mmgen_kernels.schedule.planner.floats import sqrt
from mmgen_kernels.schedule.planner.variance_preserving import check_timesteps

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def alphas_cumprod(config: Config) -> Tensor:
    """(num_train_timesteps,), fp64 where beta_schedule is scaled_linear."""
    wide = config["trained_betas"] is None and config["beta_schedule"] == "scaled_linear"
    of_training = betas.of_config(config, betas.SCHEDULES, torch.float64 if wide else torch.float32)
    product = torch.cumprod(1.0 - of_training, dim=0)
    scale = config["snr_shift_scale"]
    product = product / (scale + (1 - scale) * product)
    return betas.zero_terminal(product.sqrt()) if config["rescale_betas_zero_snr"] else product


def schedule(config: Config, run: Run) -> Schedule:
    alphas = alphas_cumprod(config).tolist()
    timesteps = spacing.whole(config, steps_of(run))
    check_timesteps(timesteps, len(alphas))
    return Schedule(tuple(timesteps), "int64", alphas_cumprod=tuple(alphas))


def steps_of(run: Run) -> int:
    if run.num_inference_steps is None:
        raise ValueError("num_inference_steps must be given for a CogVideoX scheduler, got None")
    return run.num_inference_steps


def previous(config: Config, run: Run, alphas: tuple[float, ...], t: int) -> float | None:
    """alphas_cumprod where the step from t leads, None beyond the last timestep."""
    apart = config["num_train_timesteps"] // steps_of(run)
    return alphas[t - apart] if t >= apart else None


def last(config: Config, alphas: tuple[float, ...]) -> float:
    return 1.0 if config["set_alpha_to_one"] else alphas[0]


def signal_and_noise(a: float) -> tuple[float, float]:
    return sqrt(a), sqrt(1 - a)
