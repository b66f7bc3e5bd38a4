"""
DDIMScheduler, Song et al. 2020, equation 12:

    x' = sqrt(a') x0 + sqrt(1 - a' - s^2) epsilon + s z        s = eta sqrt((1 - a') / (1 - a) (1 - a / a'))

with a, a' alphas_cumprod at this timestep and the previous one. In diffusers alphas_cumprod is fp32, as here; so is what it
computes from it, which is fp64 here. Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, conversion, spacing
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_signal, check_timesteps, of_levels, steps_of

TAKES = ("num_inference_steps", "begin", "eta", "use_clipped_model_output")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def schedule(config: Config, run: Run) -> Schedule:
    alphas = betas.alphas_cumprod(config).tolist()
    timesteps = spacing.whole(config, steps_of(run, "DDIMScheduler"))
    check_timesteps(timesteps, len(alphas))
    return Schedule(tuple(timesteps), "int64", alphas_cumprod=tuple(alphas))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, alphas = config["prediction_type"], of_levels(levels)
    final = 1.0 if config["set_alpha_to_one"] else alphas[0]
    apart = config["num_train_timesteps"] // steps_of(run, "DDIMScheduler")
    clipping = clip(config)
    rows = []
    for time in levels.timesteps[run.begin :]:
        t = int(time)
        a, previous = alphas[t], alphas[t - apart] if t >= apart else final
        check_signal(a, kind, t)
        alpha, sigma = sqrt(a), sqrt(1 - a)
        original = conversion.original(kind, alpha, sigma, PREDICTIONS)
        epsilon = conversion.epsilon(kind, alpha, sigma, PREDICTIONS)
        if run.use_clipped_model_output and clipping:
            epsilon = (SAMPLE - alpha * DERIVED) / sigma
        share = run.eta**2 * div(1 - div(a, previous), 1 - a)  # of the variance at t', drawn anew
        # 1 - share as a factor: 1 - a' - s^2 falls below 0 by rounding where eta is 1 and no signal is left
        prev = sqrt(previous) * DERIVED + sqrt((1 - previous) * (1 - share)) * epsilon
        if run.eta > 0:
            prev = prev + sqrt((1 - previous) * share) * NOISE
        rows.append(matrix(("sample", "model_output"), original, prev if clipping else prev.replace("derived", original), DERIVED))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(run.eta > 0,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        **clipping,
    )
