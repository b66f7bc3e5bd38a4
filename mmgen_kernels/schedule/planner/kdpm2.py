"""
KDPM2DiscreteScheduler, DPM-Solver-2 as k-diffusion has it (Karras et al. 2022; Lu et al. 2022): Euler's step to the level s" =
sqrt(s s') half of the way in log sigma, and the whole step with the slope from there:

    x" = x + (s" - s) (x - x0) / s
    x' = x + (s' - s) (x" - x0") / s"

x0 is x - s m (epsilon) or x / (s^2 + 1) - s m / sqrt(s^2 + 1) (v_prediction). In diffusers sigmas are fp32, as here, and so is
all that comes of them, s" too, which is fp64 here. Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner import betas, conversion
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.euler import denoised
from mmgen_kernels.schedule.planner.floats import f32, log, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, SAMPLE, column, matrix
from mmgen_kernels.schedule.planner.two_evaluations import evaluations, times_of_run, twice

TAKES = ("num_inference_steps", "num_train_timesteps", "begin")
PREDICTIONS = ("epsilon", "v_prediction")
INPUTS = ("sample", "model_output", "last_sample")


def schedule(config: Config, run: Run) -> Schedule:
    return interleaved(config, run, lambda levels: levels.log().lerp(levels.roll(1).log(), 0.5).exp()[1:-1])


def interleaved(config: Config, run: Run, between: Callable[[Tensor], Tensor]) -> Schedule:
    """Levels, each but the first twice, and timesteps with those of the levels between them, which diffusers makes of fp32."""
    sigmas, times = sigma_space.spaced(config, *times_of_run(config, run))
    if config["use_karras_sigmas"]:
        times = [float(round(t)) for t in times]
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float64, device="cpu").float()
    table = sigma_space.logs(sigma_space.training_sigmas(betas.alphas_cumprod(config)))
    logarithms = [f32(log(max(sigma, f32(1e-10)))) for sigma in between(levels).tolist()]
    halfway = sigma_space.times_of_logs(logarithms, table)
    times = [*times[:1], *(t for pair in zip(halfway, times[1:], strict=True) for t in pair)]
    wide = sigma_space.chosen_respacing(config) is not None
    known, dtype = (*twice(levels.tolist()), 0.0), "float64" if wide else "float32"
    start = sigma_space.start(config, known)
    return Schedule(tuple(times if wide else map(f32, times)), dtype, known, init_noise_sigma=start)


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, sigmas = config["prediction_type"], sigma_space.of_levels(levels)
    conversion.check(kind, PREDICTIONS)
    rows, scales = [], []
    for i, first in evaluations(run, levels):
        s, to = (sigmas[i], halfway(sigmas, i + 1)) if first else (sigmas[i - 1], sigmas[i])
        at = s if first else halfway(sigmas, i)
        original = denoised(kind, SAMPLE, at, at)
        x = SAMPLE if first else column("last_sample")
        rows.append(matrix(INPUTS, original, x + (to - s) * ((SAMPLE - original) / at), DERIVED))
        scales.append(1 / sqrt(at**2 + 1))
    return two_stage(levels, run, rows, scales, (False,) * len(rows))


def two_stage(levels: Schedule, run: Run, rows: list[list[list[float]]], scales: list[float], noisy: tuple[bool, ...]) -> Plan:
    return Plan(
        inputs=INPUTS,
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=noisy,
        scale_model_input=tuple(scales),
        feeds={"last_sample": "sample"},
    )


def halfway(sigmas: Sequence[float], i: int) -> float:
    """The level where evaluation i, if it is a second one, asks the model."""
    j = (i + 1) // 2
    return sqrt(sigmas[2 * j - 2] * sigmas[2 * j])
