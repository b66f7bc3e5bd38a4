"""
EulerAncestralDiscreteScheduler: an Euler step to a lower level than asked, and noise up to it (k-diffusion, euler_ancestral):

    x' = x + (down - s) (x - x0) / s + up z        up = s' sqrt(s^2 - s'^2) / s, down = sqrt(s'^2 - up^2) = s'^2 / s

x0 is x - s m (epsilon) or x / (s^2 + 1) - s m / sqrt(s^2 + 1) (v_prediction). Noise is drawn in the last step too, where up is 0.
In diffusers sigmas are fp32, as here, and so is all that comes of them, which is fp64 here.
Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, conversion, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.euler import denoised
from mmgen_kernels.schedule.planner.floats import div, f32, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, MODEL_OUTPUT, NOISE, SAMPLE, matrix

TAKES = ("num_inference_steps", "begin")
PREDICTIONS = ("epsilon", "v_prediction")


def schedule(config: Config, run: Run) -> Schedule:
    if run.num_inference_steps is None:
        raise ValueError("num_inference_steps must be given for EulerAncestralDiscreteScheduler, got None")
    table = sigma_space.training_sigmas(betas.alphas_cumprod(config, terminal=betas.LEAST_ALPHA))
    times = spacing.fractional(config, run.num_inference_steps)
    sigmas = [f32(sigma) for sigma in (*sigma_space.interpolate(times, table), 0.0)]
    return Schedule(tuple(times), "float32", tuple(sigmas), init_noise_sigma=sigma_space.start(config, sigmas))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, sigmas = config["prediction_type"], sigma_space.of_levels(levels)
    conversion.check(kind, PREDICTIONS)
    rows, scales = [], []
    for i in range(run.begin, len(levels.timesteps)):
        s, to = sigmas[i], sigmas[i + 1]
        up, down = div(to * sqrt(s**2 - to**2), s), div(to**2, s)
        original = denoised(kind, SAMPLE, s, s)
        if kind == "epsilon":
            mean = SAMPLE + (down - s) * MODEL_OUTPUT
        else:
            ratio = div(down - s, s)
            mean = (1 + ratio) * SAMPLE - ratio * original
        rows.append(matrix(("sample", "model_output"), original, mean + up * NOISE, DERIVED))
        scales.append(1 / sqrt(s**2 + 1))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(True,) * len(rows),
        scale_model_input=tuple(scales),
    )
