"""
UniPCMultistepScheduler, Zhao et al. 2023: a predictor of order p, and before it a corrector of the last step with what the model
says now. With m0 the converted model output (x0 where predict_x0, else epsilon), h = lambda' - lambda, z = -h (x0) or h (epsilon),
B = z (bh1) or e^z - 1 (bh2), w = alpha' (x0) or sigma' (epsilon):

    x' = k x - w (e^z - 1) m0 - w B sum_j rho_j (m_j - m0) / r_j        k = sigma' / sigma (x0) or alpha' / alpha (epsilon)

over the levels r_j h away: the ones before, and for the corrector the one reached too, r = 1. rho solves sum_j rho_j r_j^(i - 1) =
i! phi_(i + 1)(z) z / B; alone it is 1/2, as is the first of the second order's predictor.

One row does all three: m0 from sample and model_output, the corrected sample from last_sample and m1, m2, m3, x' from that.

In diffusers the sigmas are fp32 as here, spaced in fp64 before that as here; alpha, lambda, h, rho and all that comes of them are
fp32 there, fp64 here. With bh1 and a last level of 0 diffusers' last sample is NaN, infinity times an empty sum; here the
sum is empty. Outputs: prev_sample, corrected, m0; derived is m0, thresholded where it is x0.
"""

from __future__ import annotations

import math

from mmgen_kernels.schedule.planner import betas, conversion, shift, solver_levels, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, expm1, f32
from mmgen_kernels.schedule.planner.forms import DERIVED, SAMPLE, Form, column, matrix
from mmgen_kernels.schedule.planner.solver_levels import Level
from mmgen_kernels.schedule.planner.special import phi, solve

TAKES = ("num_inference_steps", "sigmas", "mu", "begin")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SOLVERS = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
ORDERS = (1, 2, 3)


def schedule(config: Config, run: Run) -> Schedule:
    if (run.num_inference_steps is None) == (run.sigmas is None):
        raise ValueError(f"one of num_inference_steps and sigmas must be given, got {run.num_inference_steps} and {run.sigmas}")
    if run.sigmas is not None and not config["use_flow_sigmas"]:
        raise ValueError(f"sigmas are taken where use_flow_sigmas is set, got {run.sigmas}")
    if config["shift_terminal"] is not None and not config["use_flow_sigmas"]:
        raise ValueError(f"shift_terminal is taken where use_flow_sigmas is set, got {config['shift_terminal']}")
    if config["use_dynamic_shifting"] and run.mu is None:
        raise ValueError("mu must be given where use_dynamic_shifting is set, got None")
    steps = len(run.sigmas) if run.sigmas is not None else run.num_inference_steps or 0
    n, kind = config["num_train_timesteps"], sigma_space.chosen_respacing(config)
    times: list[float] = [*spacing.above_zero(config, steps, n)]
    table = sigma_space.training_sigmas(betas.alphas_cumprod(config, terminal=betas.LEAST_ALPHA))
    least = table[0]
    if kind is not None:
        sigmas, times = _respaced(config, run, kind, table, steps)
        least = sigmas[-1]
    elif config["use_flow_sigmas"]:
        sigmas = _flow(config, run, steps)
        times, least = [s * n for s in sigmas], sigmas[-1]
    else:
        sigmas = sigma_space.interpolate(times, table)
    sigmas = [f32(sigma) for sigma in (*sigmas, sigma_space.last_sigma(config, least))]
    return Schedule(tuple(int(t) for t in times), "int64", sigmas=tuple(sigmas))


def _respaced(config: Config, run: Run, kind: str, table: list[float], steps: int) -> tuple[list[float], list[float]]:
    """Levels without the last one, and timesteps. A caller's own sigmas take the place of the training levels."""
    ends, logs = table, sigma_space.logs(table)
    if run.sigmas is not None:
        ends = [float(sigma) for sigma in run.sigmas]
        logs = [math.log(sigma) for sigma in ends]
    sigmas = sigma_space.respaced(config, ends[-1], ends[0], steps) or []
    if kind != "use_karras_sigmas":
        return sigmas, sigma_space.times_of(sigmas, logs)
    if config["use_flow_sigmas"]:
        sigmas = [s / (s + 1) for s in sigmas]
        return sigmas, [s * config["num_train_timesteps"] for s in sigmas]
    return sigmas, [round(t) for t in sigma_space.times_of(sigmas, logs)]


def _flow(config: Config, run: Run, steps: int) -> list[float]:
    even = spacing.linspace(1, 1 / config["num_train_timesteps"], steps + 1)[:-1]
    sigmas = shift.column([float(s) for s in run.sigmas] if run.sigmas is not None else even)
    if run.mu is not None and config["use_dynamic_shifting"]:
        sigmas = shift.dynamic(sigmas, config["time_shift_type"], run.mu)
    else:
        sigmas = shift.by_factor(sigmas, config["flow_shift"])
    if config["shift_terminal"]:
        sigmas = shift.to_terminal(sigmas, config["shift_terminal"])
    values: list[float] = sigmas.tolist()
    if abs(values[0] - 1) < 1e-6:
        values[0] -= 1e-6  # diffusers' way to keep log(alpha) finite
    return values


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    order, steps = config["solver_order"], len(levels.timesteps)
    if order not in ORDERS:
        raise ValueError(f"solver_order must be 1, 2 or 3, got {order}")
    if config["solver_type"] not in SOLVERS:
        raise ValueError(f"solver_type must be one of {', '.join(SOLVERS)}, got {config['solver_type']!r}")
    if config["solver_p"] is not None:
        raise ValueError(
            f"solver_p must be None, got {type(config['solver_p']).__name__}: another scheduler's step is no row of this table"
        )
    points = [Level(sigma, config["use_flow_sigmas"]) for sigma in sigma_space.of_levels(levels)]
    history = [column(f"m{j}") for j in range(1, order + 1)]
    inputs = ("sample", "model_output", "last_sample", *(f"m{j}" for j in range(1, order + 1)))
    rows, last_order = [], 0
    for i in range(run.begin, steps):
        corrected = SAMPLE
        if i > run.begin and i - 1 not in config["disable_corrector"]:
            before = points[i - 1 :: -1][:last_order]
            corrected = _step(config, column("last_sample"), points[i], before, history, DERIVED)
        this_order = min(order, i - run.begin + 1, steps - i if config["lower_order_final"] else order)
        prev = _step(config, corrected, points[i + 1], points[i::-1][:this_order], [DERIVED, *history], None)
        rows.append(matrix(inputs, _converted(config, points[i]), prev, corrected, DERIVED))
        last_order = this_order
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "corrected", "m0"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(False,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        feeds={"last_sample": "corrected"} | {f"m{j}": f"m{j - 1}" for j in range(1, order + 1)},
        **(clip(config) if config["predict_x0"] else {}),
    )


def _converted(config: Config, at: Level) -> Form:
    if config["predict_x0"]:
        return solver_levels.original(config, at)
    return conversion.epsilon(config["prediction_type"], at.alpha, at.sigma, PREDICTIONS)


def _step(config: Config, x: Form, to: Level, near: list[Level], outputs: list[Form], reached: Form | None) -> Form:
    """
    From near[0] to `to`: x there, outputs[j] the converted output at near[j]; `reached`, the one at `to`, makes it the corrector.
    """
    at, m0 = near[0], outputs[0]
    h = to.log_snr - at.log_snr
    predict_x0 = config["predict_x0"]
    z = -h if predict_x0 else h
    weight, carried = (to.alpha, div(to.sigma, at.sigma)) if predict_x0 else (to.sigma, div(to.alpha, at.alpha))
    ratios = [div(level.log_snr - at.log_snr, h) for level in near[1:]]
    differences = [(output - m0) / r for output, r in zip(outputs[1:], ratios, strict=False)]
    if reached is not None:
        ratios, differences = [*ratios, 1.0], [*differences, reached - m0]
    step = carried * x - weight * expm1(z) * m0
    if not ratios:
        return step
    b = z if SOLVERS[config["solver_type"]] == "bh1" else expm1(z)
    for rho, difference in zip(_rho(ratios, z, b), differences, strict=True):
        step = step - weight * b * rho * difference
    return step


def _rho(ratios: list[float], z: float, b: float) -> list[float]:
    if len(ratios) == 1:
        return [0.5]
    powers = [[r**i for r in ratios] for i in range(len(ratios))]
    return solve(powers, [div(math.factorial(i) * z * phi(i + 1, z), b) for i in range(1, len(ratios) + 1)])
