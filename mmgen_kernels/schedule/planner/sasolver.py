"""
SASolverScheduler, Xue et al. 2023, stochastic Adams: a predictor, and before it a corrector of the last step with what the model
says now. With lambda = log(alpha / sigma), h = lambda' - lambda, tau of the step's timestep, T = 1 + tau^2, and l_j the Lagrange
polynomials of u = lambda' - l at the levels whose converted outputs m_j count (the corrector's: the one that was reached, too)

    data    x' = exp(-tau^2 h) sigma' / sigma x + T alpha' sum_j m_j integral of l_j exp(-T u) du over [0, h] + s z
            s  = sigma' sqrt(1 - exp(-2 tau^2 h))
    noise   x' = alpha' / alpha x - T sigma' sum_j m_j integral of l_j exp(u) du over [0, h] + tau sigma' sqrt(exp(2 h) - 1) z

and the second order's difference m_0 - m_1 has T alpha' h^2 (1/2 - phi_2(-T h)) / (lambda_0 - lambda_1) more in the data form, as
diffusers has it. The corrector has tau and noise of the step that it corrects. Noise is drawn where tau is 0, too.

One row does it all: m0 from sample and model_output, the corrected sample from last_sample and what was seen since, x' from that.
"last_noise" is the step's before. "noise_prediction" with thresholding fails in diffusers and is refused. In diffusers the sigmas
are fp32 as here; what comes of them is fp32 there, fp64 here. Levels end as DEIS' do. Outputs: prev_sample, corrected, m0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmgen_kernels.schedule.planner import betas, conversion, solver_levels, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, exp, expm1, f32, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, Form, column, matrix
from mmgen_kernels.schedule.planner.solver_levels import Level
from mmgen_kernels.schedule.planner.special import exponential_adams, phi

TAKES = ("num_inference_steps", "begin", "tau_func")
ALGORITHMS = ("data_prediction", "noise_prediction")
ORDERS = (1, 2, 3, 4)


def schedule(config: Config, run: Run) -> Schedule:
    if run.num_inference_steps is None:
        raise ValueError("num_inference_steps must be given for SASolverScheduler, got None")
    steps, alphas = run.num_inference_steps, betas.alphas_cumprod(config)
    table = sigma_space.training_sigmas(alphas)
    times: list[float] = [*spacing.above_zero(config, steps, len(table) - solver_levels.clipped(config, alphas))]
    sigmas, times, respaced = solver_levels.spaced(config, steps, times, table, config["flow_shift"])
    sigmas = [f32(sigma) for sigma in (*sigmas, sigmas[-1] if respaced else table[0])]
    return Schedule(tuple(int(t) for t in times), "int64", sigmas=tuple(sigmas))


def between(timestep: float) -> int:
    """diffusers' tau: noise in the middle of a run alone."""
    return 1 if 200 <= timestep <= 800 else 0


def history(config: Config) -> int:
    """How many converted outputs are kept."""
    return max(config["predictor_order"], config["corrector_order"] - 1)


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    if config["algorithm_type"] not in ALGORITHMS:
        raise ValueError(f"algorithm_type must be one of {', '.join(ALGORITHMS)}, got {config['algorithm_type']!r}")
    for name in ("predictor_order", "corrector_order"):
        if config[name] not in ORDERS:
            raise ValueError(f"{name} must be 1, 2, 3 or 4, got {config[name]}")
    if config["algorithm_type"] == "noise_prediction" and config["thresholding"]:
        raise ValueError("thresholding is not taken by algorithm_type noise_prediction: diffusers fails there")
    tau_of: Callable[[int], Any] = run.tau_func or config["tau_func"] or between
    taus = [float(tau_of(int(t))) for t in levels.timesteps]
    points = [Level(sigma, config["use_flow_sigmas"]) for sigma in sigma_space.of_levels(levels)]
    past = [column(f"m{j}") for j in range(1, max(config["predictor_order"], config["corrector_order"]))]
    inputs = ("sample", "model_output", "last_sample", "last_noise", *(f"m{j}" for j in range(1, len(past) + 1)))
    rows, drawn, steps = [], column("last_noise"), len(levels.timesteps)
    for i in range(run.begin, steps):
        corrected = SAMPLE
        if i > run.begin:
            near = points[i::-1][: orders(config, run.begin, steps, i - 1)[1]]
            corrected = update(config, column("last_sample"), points[i], points[i - 1], near, [DERIVED, *past], taus[i - 1], drawn)
        near = points[i::-1][: orders(config, run.begin, steps, i)[0]]
        prev = update(config, corrected, points[i + 1], points[i], near, [DERIVED, *past], taus[i], NOISE)
        rows.append(matrix(inputs, converted(config, points[i]), prev, corrected, DERIVED))
    learned = config["variance_type"] in ("learned", "learned_range") and config["prediction_type"] == "epsilon"
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "corrected", "m0"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(True,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        feeds={"last_sample": "corrected", "last_noise": "noise"} | {f"m{j}": f"m{j - 1}" for j in range(1, len(past) + 1)},
        channels=3 if learned else None,
        **clip(config),
    )


def orders(config: Config, begin: int, steps: int, i: int) -> tuple[int, int]:
    """Of step i's predictor, and of the corrector of that step, in a run from step `begin` on."""
    known, left = min(i - begin, history(config)), steps - i
    most = (left, left + 1) if config["lower_order_final"] else (config["predictor_order"], config["corrector_order"])
    return min(config["predictor_order"], most[0], known + 1), min(config["corrector_order"], most[1], known + 2)


def converted(config: Config, at: Level) -> Form:
    if config["algorithm_type"] == "data_prediction":
        return solver_levels.original(config, at)
    return conversion.epsilon(config["prediction_type"], at.alpha, at.sigma, conversion.VARIANCE_PRESERVING)


def update(
    config: Config, x: Form, to: Level, at: Level, near: list[Level], outputs: list[Form], tau: float, noise: Form
) -> Form:
    """From `at` to `to`, with the converted outputs of the levels `near`."""
    h, power = to.log_snr - at.log_snr, 1 + tau**2
    back = [to.log_snr - level.log_snr for level in near]
    if config["algorithm_type"] == "noise_prediction":
        step, drawn = div(to.alpha, at.alpha) * x, tau * to.sigma * sqrt(expm1(2 * h))
        weights = [-power * to.sigma * w for w in exponential_adams(back, h, 1.0)]
    else:
        step, drawn = exp(-(tau**2) * h) * div(to.sigma, at.sigma) * x, to.sigma * sqrt(-expm1(-2 * tau**2 * h))
        weights = [power * to.alpha * w for w in exponential_adams(back, h, -power)]
        if len(near) == 2:
            more = div(power * to.alpha * h**2 * (0.5 - phi(2, -power * h)), near[0].log_snr - near[1].log_snr)
            weights = [weights[0] + more, weights[1] - more]
    for weight, output in zip(weights, outputs, strict=False):
        step = step + weight * output
    return step + drawn * noise
