"""
EulerDiscreteScheduler, Karras et al. 2022, algorithm 2 without its correction:

    xh = x + s_noise sqrt(sh^2 - s^2) z        sh = s (1 + min(s_churn / steps, sqrt(2) - 1)) for s_tmin <= s <= s_tmax, else s
    x' = xh + (s' - sh) (xh - x0) / sh

x0 is xh - sh m (epsilon), m (sample) or xh / (s^2 + 1) - s m / sqrt(s^2 + 1) (v_prediction); the last has s where sh would be
expected, as diffusers has it. In diffusers sigmas are fp32, as here, and so is all that comes of them, which is fp64 here.
Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmgen_kernels.schedule.planner import betas, conversion, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, f32, log, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, MODEL_OUTPUT, NOISE, SAMPLE, Form, matrix

TAKES = ("num_inference_steps", "timesteps", "sigmas", "begin", "s_churn", "s_tmin", "s_tmax", "s_noise")
PREDICTIONS = ("epsilon", "sample", "v_prediction", "original_sample")


def schedule(config: Config, run: Run) -> Schedule:
    table = sigma_space.training_sigmas(betas.alphas_cumprod(config, terminal=betas.LEAST_ALPHA))
    continuous = config["timestep_type"] == "continuous" and config["prediction_type"] == "v_prediction"
    if sum(given is not None for given in (run.num_inference_steps, run.timesteps, run.sigmas)) != 1:
        raise ValueError(
            "one of num_inference_steps, timesteps and sigmas must be given, got "
            f"{run.num_inference_steps}, {run.timesteps} and {run.sigmas}"
        )
    if run.timesteps is not None and (continuous or sigma_space.chosen_respacing(config)):
        raise ValueError(f"timesteps cannot be given where {sigma_space.chosen_respacing(config) or 'timestep_type'} decides them")
    if run.sigmas is not None:
        sigmas = [f32(sigma) for sigma in run.sigmas]
        log_table = sigma_space.logs(table)
        times = [sigma_space.time_of(f32(log(max(sigma, f32(1e-10)))), log_table) for sigma in sigmas[:-1]]
    else:
        sigmas, times = _spaced(config, run, table)
    if continuous:
        times = [0.25 * f32(log(sigma)) for sigma in sigmas[:-1]]
    times, start = [f32(t) for t in times], sigma_space.start(config, sigmas)
    return Schedule(tuple(times), "float32", sigmas=tuple(sigmas), init_noise_sigma=start)


def _spaced(config: Config, run: Run, table: list[float]) -> tuple[list[float], list[float]]:
    """Levels, the last one included, and timesteps."""
    if run.timesteps is not None:
        times = [f32(t) for t in run.timesteps]
    else:
        times = spacing.fractional(config, run.num_inference_steps or 0)
    steps = len(times) if run.num_inference_steps is None else run.num_inference_steps
    kind = config["interpolation_type"]
    if kind == "linear":
        sigmas = sigma_space.interpolate(times, table)
    elif kind == "log_linear":
        ends = (f32(log(table[-1])), f32(log(table[0])))
        sigmas = torch.linspace(*ends, steps + 1, dtype=torch.float32, device="cpu").exp().tolist()
    else:
        raise ValueError(f"interpolation_type must be linear or log_linear, got {kind!r}")
    respaced = sigma_space.respaced(config, sigmas[0], sigmas[-1], steps)
    if respaced is not None:
        sigmas, times = respaced, sigma_space.times_of(respaced, sigma_space.logs(table))
    return [f32(sigma) for sigma in (*sigmas, sigma_space.last_sigma(config, table[0]))], times


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, sigmas = config["prediction_type"], sigma_space.of_levels(levels)
    conversion.check(kind, PREDICTIONS)
    rows, drawn, scales = [], [], []
    for i in range(run.begin, len(levels.timesteps)):
        s, to = sigmas[i], sigmas[i + 1]
        x, hat = churned(run, sigmas, i)
        original = denoised(kind, x, s, hat)
        if kind == "epsilon":
            prev = x + (to - hat) * MODEL_OUTPUT
        else:
            ratio = div(to - hat, hat)
            prev = (1 + ratio) * x - ratio * original
        rows.append(matrix(("sample", "model_output"), original, prev, DERIVED))
        drawn.append(hat > s)
        scales.append(1 / sqrt(s**2 + 1))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=tuple(drawn),
        scale_model_input=tuple(scales),
    )


def churned(run: Run, sigmas: Sequence[float], i: int) -> tuple[Form, float]:
    """The sample of step i with the noise that s_churn adds, and its level."""
    s = sigmas[i]
    gamma = min(run.s_churn / (len(sigmas) - 1), 2**0.5 - 1) if run.s_tmin <= s <= run.s_tmax else 0.0
    if gamma <= 0:
        return SAMPLE, s
    hat = s * (gamma + 1)
    return SAMPLE + sqrt(hat**2 - s**2) * run.s_noise * NOISE, hat


def denoised(prediction_type: str, x: Form, s: float, hat: float) -> Form:
    """x0 in sigma space, of a sample x whose level is `hat`."""
    if prediction_type == "epsilon":
        return x - hat * MODEL_OUTPUT
    if prediction_type == "v_prediction":
        return (1 / (s**2 + 1)) * x - (s / sqrt(s**2 + 1)) * MODEL_OUTPUT
    return MODEL_OUTPUT
