"""
HeunDiscreteScheduler, Karras et al. 2022, algorithm 2 without its noise: Euler's step, and from its end the mean of both slopes:

    d1 = (x - x0) / s       x' = x + (s' - s) d1
    d2 = (x' - x0') / s'    x'' = x + (s' - s) (d1 + d2) / 2

x0 is x - s m (epsilon), m (sample) or x / (s^2 + 1) - s m / sqrt(s^2 + 1) (v_prediction), clipped where clip_sample. In diffusers
sigmas are fp32, as here, and so is all that comes of them, which is fp64 here. Outputs: prev_sample, pred_original_sample, and of a
first evaluation its derivative.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, conversion
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.euler import denoised
from mmgen_kernels.schedule.planner.floats import f32, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, SAMPLE, Form, column, matrix
from mmgen_kernels.schedule.planner.two_evaluations import evaluations, times_of_run, twice

TAKES = ("num_inference_steps", "timesteps", "num_train_timesteps", "begin")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = (*betas.SCHEDULES, "exp")
INPUTS = ("sample", "model_output", "last_sample", "derivative")


def schedule(config: Config, run: Run) -> Schedule:
    chosen = sigma_space.chosen_respacing(config)
    if run.timesteps is not None and chosen:
        raise ValueError(f"timesteps cannot be given where {chosen} decides them, got {run.timesteps}")
    sigmas, times = sigma_space.spaced(config, *times_of_run(config, run), BETA_SCHEDULES)
    levels = [*twice([f32(sigma) for sigma in sigmas]), 0.0]
    times = twice([f32(t) for t in times])
    return Schedule(tuple(times), "float32", tuple(levels), init_noise_sigma=sigma_space.start(config, levels))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, sigmas, clipping = config["prediction_type"], sigma_space.of_levels(levels), clip(config)
    conversion.check(kind, PREDICTIONS)
    rows, scales = [], []
    for i, first in evaluations(run, levels):
        s, to = (sigmas[i], sigmas[i + 1]) if first else (sigmas[i - 1], sigmas[i])
        at = s if first else to
        original = denoised(kind, SAMPLE, at, at)
        slope = (SAMPLE - (DERIVED if clipping else original)) / at
        if first:
            rows.append(matrix(INPUTS, original, SAMPLE + (to - s) * slope, DERIVED, slope))
        else:
            mean = 0.5 * (column("derivative") + slope)
            rows.append(matrix(INPUTS, original, column("last_sample") + (to - s) * mean, DERIVED, Form({})))
        scales.append(1 / sqrt(sigmas[i] ** 2 + 1))
    return Plan(
        inputs=INPUTS,
        outputs=("prev_sample", "pred_original_sample", "derivative"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(False,) * len(rows),
        scale_model_input=tuple(scales),
        feeds={"last_sample": "sample", "derivative": "derivative"},
        **clipping,
    )
