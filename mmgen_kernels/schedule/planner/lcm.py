"""
LCMScheduler, Luo et al. 2023, multistep consistency sampling:

    denoised = c_skip x + c_out x0             c_skip = 1/4 / (T^2 + 1/4), c_out = T / sqrt(T^2 + 1/4), T = timestep_scaling t
    x' = sqrt(a') denoised + sqrt(1 - a') z    denoised alone after the last step

with a' alphas_cumprod at the next timestep of the run. Timesteps are picked from the `original_inference_steps` of the
distillation; with a list of one's own and a strength below 1 diffusers does not know the last step, and noise of that step's own
level is added there. In diffusers alphas_cumprod and all that comes of it are fp32, c_skip and c_out too; here alphas_cumprod
alone. Outputs: prev_sample, denoised.
"""

from __future__ import annotations

import math

from mmgen_kernels.schedule.planner import betas, conversion, spacing
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_signal, check_timesteps, descending, of_levels, one_list

TAKES = ("num_inference_steps", "timesteps", "begin", "original_inference_steps", "strength")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SIGMA_DATA = 0.5


def schedule(config: Config, run: Run) -> Schedule:
    return schedule_from(config, run, candidates(config, run))


def schedule_from(config: Config, run: Run, candidates: list[int]) -> Schedule:
    """The run's own timesteps, or some of the candidates, which ascend."""
    one_list(run)
    alphas = betas.alphas_cumprod(config).tolist()
    if run.timesteps is not None:
        timesteps = descending(run.timesteps)
        timesteps = timesteps[max(len(timesteps) - min(int(len(timesteps) * run.strength), len(timesteps)), 0) :]
    else:
        timesteps = _picked(config, run, candidates[::-1])
    check_timesteps(timesteps, len(alphas))
    return Schedule(tuple(timesteps), "int64", alphas_cumprod=tuple(alphas))


def candidates(config: Config, run: Run) -> list[int]:
    """The timesteps of the distillation, ascending."""
    n = config["num_train_timesteps"]
    original = run.original_inference_steps or config["original_inference_steps"]
    if original > n:
        raise ValueError(f"original_inference_steps must be at most num_train_timesteps {n}, got {original}")
    return [i * (n // original) - 1 for i in range(1, int(original * run.strength) + 1)]


def _picked(config: Config, run: Run, descending: list[int]) -> list[int]:
    steps, original = run.num_inference_steps or 0, run.original_inference_steps or config["original_inference_steps"]
    if steps > min(len(descending), original):
        raise ValueError(
            f"num_inference_steps must be at most original_inference_steps x strength {min(len(descending), original)}, got {steps}"
        )
    return [descending[math.floor(i)] for i in spacing.linspace(0, len(descending), steps, endpoint=False)]


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, alphas, times = config["prediction_type"], of_levels(levels), [int(t) for t in levels.timesteps]
    steps = len(run.timesteps) if run.timesteps is not None else run.num_inference_steps or 0
    final = 1.0 if config["set_alpha_to_one"] else alphas[0]
    clipping = clip(config)
    rows, noisy = [], []
    for i in range(run.begin, len(times)):
        t, following = times[i], times[min(i + 1, len(times) - 1)]
        a, previous = alphas[t], alphas[following] if following >= 0 else final
        check_signal(a, kind, t)
        scaled = t * config["timestep_scaling"]
        skip, out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / sqrt(scaled**2 + SIGMA_DATA**2)
        original = conversion.original(kind, sqrt(a), sqrt(1 - a), PREDICTIONS)
        denoised = out * DERIVED + skip * SAMPLE
        if not clipping:
            denoised = denoised.replace("derived", original)
        noisy.append(i != steps - 1)
        prev = sqrt(previous) * denoised + sqrt(1 - previous) * NOISE if noisy[-1] else denoised
        rows.append(matrix(("sample", "model_output"), original, prev, denoised))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "denoised"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=tuple(noisy),
        scale_model_input=(1.0,) * len(rows),
        **clipping,
    )
