"""
CMStochasticIterativeScheduler, Song et al. 2023, multistep consistency sampling (algorithm 1), with e = sigma_min, d = sigma_data:

    denoised = c_skip x + c_out F        c_skip = d^2 / ((s - e)^2 + d^2), c_out = (s - e) d / sqrt(s^2 + d^2)
    x' = denoised + s_noise sqrt(sh^2 - e^2) z        sh = s' between sigma_min and sigma_max

clipped to [-1, 1] where clip_denoised. Noise is drawn in every step of a run that has more than one. In diffusers sigmas are fp32,
as here, and so is all that comes of them, which is fp64 here. Derived is denoised; the output is prev_sample.
"""

from __future__ import annotations

from dataclasses import replace

from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import f32, log, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, MODEL_OUTPUT, NOISE, SAMPLE, matrix
from mmgen_kernels.schedule.planner.variance_preserving import descending, one_list

TAKES = ("num_inference_steps", "timesteps", "begin")


def schedule(config: Config, run: Run) -> Schedule:
    one_list(run)
    n, steps = config["num_train_timesteps"], run.num_inference_steps or 0
    if run.timesteps is not None:
        times = descending(run.timesteps)
    elif steps <= n:
        times = [i * (n // steps) for i in reversed(range(steps))]
    else:
        raise ValueError(f"num_inference_steps must be at most num_train_timesteps {n}, got {steps}")
    if times[0] >= n:
        raise ValueError(f"timesteps must be below num_train_timesteps {n}, got {times[0]}")
    sigmas = [sigma_at(config, t / (n - 1)) for t in reversed(times)]
    levels = [f32(sigma) for sigma in (*sigmas, config["sigma_min"])]
    return Schedule(tuple(map(time_of, sigmas)), "float64", tuple(levels), init_noise_sigma=config["sigma_max"])


def sigma_at(config: Config, place: float) -> float:
    """Karras et al. 2022, equation 5: sigma_max at 0, sigma_min at 1."""
    rho = config["rho"]
    start, end = config["sigma_max"] ** (1 / rho), config["sigma_min"] ** (1 / rho)
    return (start + place * (end - start)) ** rho


def time_of(sigma: float) -> float:
    """What the model is told of a level."""
    return 1000 * 0.25 * log(sigma + 1e-44)


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    if levels.sigmas is not None and len(levels.sigmas) == len(levels.timesteps):  # those of training, before set_timesteps
        levels = replace(levels, sigmas=(*levels.sigmas, levels.sigmas[-1]))
    sigmas, least, d = sigma_space.of_levels(levels), config["sigma_min"], config["sigma_data"]
    rows, scales, noisy = [], [], len(levels.timesteps) > 1
    for i in range(run.begin, len(levels.timesteps)):
        s, to = sigmas[i], min(max(sigmas[i + 1], least), config["sigma_max"])
        denoised = d**2 / ((s - least) ** 2 + d**2) * SAMPLE + (s - least) * d / sqrt(s**2 + d**2) * MODEL_OUTPUT
        prev = DERIVED if config["clip_denoised"] else denoised
        if noisy:
            prev = prev + config["s_noise"] * sqrt(to**2 - least**2) * NOISE
        rows.append(matrix(("sample", "model_output"), denoised, prev))
        scales.append(1 / sqrt(s**2 + d**2))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample",),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(noisy,) * len(rows),
        scale_model_input=tuple(scales),
        clamp=(-1.0, 1.0) if config["clip_denoised"] else None,
    )
