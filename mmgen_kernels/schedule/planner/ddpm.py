"""
DDPMScheduler, Ho et al. 2020, equation 7:

    x' = sqrt(a') (1 - a / a') / (1 - a) x0 + sqrt(a / a') (1 - a') / (1 - a) x + std z

with a, a' alphas_cumprod at this timestep and the next of the run (1 after the last). std^2 is (1 - a') / (1 - a) (1 - a / a'), at
least 1e-20 (fixed_small, fixed_small_log), or 1 - a / a' (fixed_large), or between the two as the model says (learned_range); at
timestep 0 there is no noise. fixed_large_log is NaN in diffusers, the root of a logarithm below 0, and is refused; so is learned,
whose noise is weighed by the model's output itself. In diffusers alphas_cumprod and all that comes of it are fp32; here
alphas_cumprod alone. Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, conversion, spacing
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, log, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_signal, check_timesteps, descending, of_levels, one_list

TAKES = ("num_inference_steps", "timesteps", "begin")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = (*betas.SCHEDULES, "laplace", "sigmoid")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
LEAST_VARIANCE = 1e-20


def schedule(config: Config, run: Run) -> Schedule:
    one_list(run)
    alphas = betas.alphas_cumprod(config, BETA_SCHEDULES).tolist()
    timesteps = descending(run.timesteps) if run.timesteps is not None else spacing.whole(config, run.num_inference_steps or 0)
    check_timesteps(timesteps, len(alphas))
    return Schedule(tuple(timesteps), "int64", alphas_cumprod=tuple(alphas))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, variance_type, alphas = config["prediction_type"], config["variance_type"], of_levels(levels)
    if variance_type not in VARIANCES:
        raise ValueError(f"variance_type must be one of {', '.join(VARIANCES)}, got {variance_type!r}")
    clipping = clip(config)
    rows, noisy, logs = [], [], []
    times = [*map(int, levels.timesteps), -1]
    for t, following in zip(times[run.begin : -1], times[run.begin + 1 :], strict=True):
        a, previous = alphas[t], alphas[following] if following >= 0 else 1.0
        check_signal(a, kind, t)
        beta = 1 - div(a, previous)
        least = max(div(1 - previous, 1 - a) * beta, LEAST_VARIANCE)
        original = conversion.original(kind, sqrt(a), sqrt(1 - a), PREDICTIONS)
        prev = div(sqrt(previous) * beta, 1 - a) * DERIVED + div(sqrt(div(a, previous)) * (1 - previous), 1 - a) * SAMPLE
        if t > 0:
            std = {"fixed_large": sqrt(beta), "learned_range": 1.0}.get(variance_type, sqrt(least))
            prev = prev + std * NOISE
        rows.append(matrix(("sample", "model_output"), original, prev if clipping else prev.replace("derived", original), DERIVED))
        noisy.append(t > 0)
        logs.append((log(least), log(beta)))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=tuple(noisy),
        scale_model_input=(1.0,) * len(rows),
        log_variance=tuple(logs) if variance_type == "learned_range" else None,
        **clipping,
    )
