"""
KDPM2AncestralDiscreteScheduler: KDPM2's step to a lower level than asked, and noise up to it (k-diffusion, dpm_2_ancestral):

    x" = x + (s" - s) (x - x0) / s                          s" = sqrt(s down) = s'
    x' = x + (down - s) (x" - x0") / s" + up z              up and down as in euler_ancestral.py

x0 is x - s m (epsilon) or x / (s^2 + 1) - s m / sqrt(s^2 + 1) (v_prediction). Noise is drawn in a step's second evaluation. In
diffusers sigmas are fp32, as here, and so is all that comes of them, s", up and down too, which is fp64 here. There down^2 is a
difference that cancels: where it falls below 0 diffusers' timestep and sample are NaN, here they are those of s'.
Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner import conversion
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.euler import denoised
from mmgen_kernels.schedule.planner.floats import div, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, column, matrix
from mmgen_kernels.schedule.planner.kdpm2 import INPUTS, PREDICTIONS, TAKES, interleaved, two_stage
from mmgen_kernels.schedule.planner.two_evaluations import evaluations

__all__ = ["TAKES", "plan", "schedule"]


def schedule(config: Config, run: Run) -> Schedule:
    return interleaved(config, run, _between)


def _between(levels: Tensor) -> Tensor:
    following = levels[1:-1]
    up = (following**2 * (levels[:-2] ** 2 - following**2) / levels[:-2] ** 2) ** 0.5
    down = (following**2 - up**2) ** 0.5
    found = levels[:-2].log().lerp(down.log(), 0.5).exp()
    return torch.where(found.isnan(), following, found)


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, sigmas = config["prediction_type"], sigma_space.of_levels(levels)
    conversion.check(kind, PREDICTIONS)
    rows, scales, noisy = [], [], []
    for i, first in evaluations(run, levels):
        j = (i + 1) // 2 if first else i // 2  # the step
        s, to = sigmas[2 * j], sigmas[min(2 * j + 2, len(sigmas) - 1)]
        at = s if first else to
        original = denoised(kind, SAMPLE, at, at)
        slope = (SAMPLE - original) / at
        if first:
            prev = SAMPLE + (to - s) * slope
        else:
            prev = column("last_sample") + (div(to**2, s) - s) * slope + div(to * sqrt(s**2 - to**2), s) * NOISE
        rows.append(matrix(INPUTS, original, prev, DERIVED))
        scales.append(1 / sqrt(at**2 + 1))
        noisy.append(not first)
    return two_stage(levels, run, rows, scales, tuple(noisy))
