"""
DPMSolverMultistepScheduler, Lu et al. 2022, DPM-Solver and DPM-Solver++ of orders 1 to 3, and their stochastic forms.

With lambda = log(alpha / sigma), h = lambda' - lambda, D0 the converted model output m0, D1 and D2 its divided differences over the
steps before, and phi_k of `special.phi`:

    ++        x' = sigma' / sigma x + alpha' h phi_1(-h) D0 + alpha' h phi_2(-h) D1 + alpha' h phi_3(-h) D2
    plain     x' = alpha' / alpha x - sigma' h phi_1(h) D0 - sigma' h phi_2(h) D1 - sigma' h phi_3(h) D2

and the second order's "midpoint" has half of D0's weight for D1. m0 is x0 (++) or epsilon (plain).

In diffusers the sigmas are fp32 as here, spaced in fp64 before that as here; alpha, lambda, h and all that comes of them are fp32
there, fp64 here. Derived is x0 where it is thresholded, else m0. Outputs: prev_sample, m0.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, conversion, solver_levels, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, exp, expm1, f32, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, Form, column, matrix
from mmgen_kernels.schedule.planner.solver_levels import Level
from mmgen_kernels.schedule.planner.special import phi

TAKES = ("num_inference_steps", "timesteps", "mu", "begin")
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SOLVERS = ("midpoint", "heun")
SYNONYMS = {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint", "deis": "dpmsolver++"}


def schedule(config: Config, run: Run) -> Schedule:
    if (run.num_inference_steps is None) == (run.timesteps is None):
        raise ValueError(
            f"one of num_inference_steps and timesteps must be given, got {run.num_inference_steps} and {run.timesteps}"
        )
    factor = solver_levels.flow_shift(config, run)
    alphas = betas.alphas_cumprod(config, terminal=betas.LEAST_ALPHA)
    table = sigma_space.training_sigmas(alphas)
    if run.timesteps is not None:
        times: list[float] = [int(t) for t in run.timesteps]
    else:
        seen = len(table) - solver_levels.clipped(config, alphas)
        times = [*spacing.above_zero(config, run.num_inference_steps or 0, seen)]
    sigmas, times = _spaced(config, run, table, times, factor)
    sigmas = [f32(sigma) for sigma in (*sigmas, sigma_space.last_sigma(config, table[0]))]
    return Schedule(tuple(int(t) for t in times), "int64", sigmas=tuple(sigmas))


def _spaced(config: Config, run: Run, table: list[float], times: list[float], shift: float) -> tuple[list[float], list[float]]:
    """Levels without the last one, and timesteps."""
    chosen = sigma_space.chosen_respacing(config)
    own = [name for name in (chosen, *("use_lu_lambdas", "use_flow_sigmas")) if name and config[name]]
    if own and run.timesteps is not None:
        raise ValueError(f"timesteps cannot be given where {own[0]} decides them, got {run.timesteps}")
    log_table, steps = sigma_space.logs(table), run.num_inference_steps or 0
    if own[:1] == ["use_flow_sigmas"]:
        return solver_levels.flow(config, steps, shift)
    if own[:1] == ["use_lu_lambdas"]:
        sigmas = [exp(x) for x in spacing.linspace(log_table[-1], log_table[0], steps)]
    else:
        respaced = sigma_space.respaced(config, table[-1], table[0], steps)
        if respaced is None:
            return sigma_space.interpolate(times, table), times
        sigmas = respaced
    times = sigma_space.times_of(sigmas, log_table)
    if own[0] in ("use_karras_sigmas", "use_lu_lambdas") and config["beta_schedule"] != "squaredcos_cap_v2":
        times = [round(t) for t in times]
    return sigmas, times


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    algorithm = SYNONYMS.get(config["algorithm_type"], config["algorithm_type"])
    solver = SYNONYMS.get(config["solver_type"], config["solver_type"])
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm_type must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver_type must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not algorithm.endswith("++") and config["final_sigmas_type"] == "zero":
        raise ValueError(f"final_sigmas_type zero is not taken by algorithm_type {algorithm}, which takes sigma_min")
    clipping, steps = clip(config), len(levels.timesteps)
    points = [Level(sigma, config["use_flow_sigmas"]) for sigma in sigma_space.of_levels(levels)]
    inputs = ("sample", "model_output", "m1", "m2")[: 1 + min(max(config["solver_order"], 1), 3)]
    rows = []
    for i in range(run.begin, steps):
        order = min(config["solver_order"], i - run.begin + 1, greatest_order(config, i, steps))
        original, m0 = _converted(config, algorithm, points[i], bool(clipping))
        near = [points[i + 1 - j] for j in range(order + 1)]  # the level to reach, this one, those before
        rows.append(matrix(inputs, original, update(algorithm, solver, near, m0), m0))
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "m0"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(algorithm.startswith("sde"),) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        feeds={"m1": "m0", "m2": "m1"} if len(inputs) == 4 else {"m1": "m0"} if len(inputs) == 3 else {},
        channels=3 if config["variance_type"] in ("learned", "learned_range") and config["prediction_type"] == "epsilon" else None,
        **clipping,
    )


def greatest_order(config: Config, i: int, steps: int) -> int:
    """The greatest order that the last steps allow."""
    few = config["lower_order_final"] and steps < 15
    if i == steps - 1 and (config["euler_at_final"] or few or config["final_sigmas_type"] == "zero"):
        return 1
    return 2 if i == steps - 2 and few else 3


def _converted(config: Config, algorithm: str, at: Level, thresholded: bool) -> tuple[Form, Form]:
    """Derived, and m0 in terms of it."""
    kind, known = config["prediction_type"], PREDICTIONS
    if algorithm.endswith("++"):
        return solver_levels.original(config, at), DERIVED
    epsilon = conversion.epsilon(kind, at.alpha, at.sigma, known)
    if not thresholded:
        return epsilon, DERIVED
    return (SAMPLE - at.sigma * epsilon) / at.alpha, (SAMPLE - at.alpha * DERIVED) / at.sigma


def update(algorithm: str, solver: str, near: list[Level], m0: Form) -> Form:
    """x' from the levels (to reach, this one, the ones before: as many as the order) and m0; m1 and m2 are columns."""
    to, at, *before = near
    h = to.log_snr - at.log_snr
    of_differences, carried, noise = weights(algorithm, solver, to, at, h, len(before) + 1)
    x = carried * SAMPLE + of_differences[0] * m0
    if before:
        r0 = div(at.log_snr - before[0].log_snr, h)
        slope = (m0 - column("m1")) / r0
        if len(before) == 2:
            r1 = div(before[0].log_snr - before[1].log_snr, h)
            bend = slope - (column("m1") - column("m2")) / r1
            x = x + div(of_differences[2], r0 + r1) * bend
            slope = slope + div(r0, r0 + r1) * bend
        x = x + of_differences[1] * slope
    return x + noise * NOISE if algorithm.startswith("sde") else x


def weights(algorithm: str, solver: str, to: Level, at: Level, h: float, order: int) -> tuple[list[float], float, float]:
    """What D0, D1 and D2, the sample and the noise are multiplied by."""
    a, s, middle = to.alpha, to.sigma, order == 2 and solver == "midpoint"
    if algorithm == "dpmsolver++":
        first = -a * expm1(-h)
        later = [first / 2] if middle else [a * h * phi(k, -h) for k in (2, 3)]
        return [first, *later], div(s, at.sigma), 0.0
    if algorithm == "dpmsolver":
        first = -s * expm1(h)
        later = [first / 2] if middle else [-s * h * phi(k, h) for k in (2, 3)]
        return [first, *later], div(a, at.alpha), 0.0
    if algorithm == "sde-dpmsolver++":
        first = -a * expm1(-2 * h)
        # The third order's weight of D2 is diffusers'; the series would have 2 h phi_3(-2 h).
        later = [first / 2] if middle else [a * 2 * h * phi(2, -2 * h), -a * (phi(2, -2 * h) + 0.5)]
        return [first, *later], div(s, at.sigma) * exp(-h), s * sqrt(-expm1(-2 * h))
    if order == 3:
        raise ValueError("solver_order must be at most 2 for algorithm_type sde-dpmsolver, got 3")
    first = -2 * s * expm1(h)
    return [first, first / 2 if middle else -2 * s * h * phi(2, h)], div(a, at.alpha), s * sqrt(expm1(2 * h))
