"""
DDIMInverseScheduler: DDIM's step towards noise, from data to the latent that it would come from (Song et al. 2020, section 4.3):

    x' = sqrt(a') x0 + sqrt(1 - a') epsilon

with a' alphas_cumprod at this timestep, where the step leads, and a at the one before it, where the sample is; before the first
there is the first entry, or 1 with set_alpha_to_one. There the sample is x0, so that a model that predicts x0 says nothing of
epsilon and the result is not finite, as in diffusers. In diffusers alphas_cumprod is fp32, as here; so is what it computes from it,
which is fp64 here. Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, conversion, spacing
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.ddim import PREDICTIONS
from mmgen_kernels.schedule.planner.floats import sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_signal, check_timesteps, of_levels, steps_of

TAKES = ("num_inference_steps", "begin")
SPACINGS = ("leading", "trailing")


def schedule(config: Config, run: Run) -> Schedule:
    if config["timestep_spacing"] not in SPACINGS:
        raise ValueError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {config['timestep_spacing']!r}")
    alphas = betas.alphas_cumprod(config).tolist()
    timesteps = spacing.whole(config, steps_of(run, "DDIMInverseScheduler"))[::-1]
    check_timesteps(timesteps, len(alphas))
    return Schedule(tuple(timesteps), "int64", alphas_cumprod=tuple(alphas))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, alphas, n = config["prediction_type"], of_levels(levels), config["num_train_timesteps"]
    first = 1.0 if config["set_alpha_to_one"] else alphas[0]
    apart = n // steps_of(run, "DDIMInverseScheduler")
    clipping = clip(config)
    rows = []
    for time in levels.timesteps[run.begin :]:
        t = int(time)
        before = min(t - apart, n - 1)
        a = alphas[before] if before >= 0 else first
        check_signal(a, kind, before)
        alpha, sigma = sqrt(a), sqrt(1 - a)
        original = conversion.original(kind, alpha, sigma, PREDICTIONS)
        epsilon = conversion.epsilon(kind, alpha, sigma, PREDICTIONS)
        prev = sqrt(alphas[t]) * DERIVED + sqrt(1 - alphas[t]) * epsilon
        rows.append(matrix(("sample", "model_output"), original, prev if clipping else prev.replace("derived", original), DERIVED))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(False,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        **clipping,
    )
