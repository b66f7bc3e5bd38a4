"""
DPMSolverSinglestepScheduler, Lu et al. 2022: DPM-Solver and DPM-Solver++ in groups of one, two or three steps, each of which starts
where its group does. From the group's first level, with h to the level reached and r_j of it to the group's j-th, D0 the group's
first converted output and D1, D2 its divided differences there, the weights are `dpmsolver.weights`:

    x' = carried x_first + w0 D0 + w1 D1 + w2 D2        D1 by the group's last output alone in the third order's "midpoint"

`order_list` has each step's place in its group. Where a run begins within one, the group is cut to the history that there is, as in
diffusers. Where the groups do not add up to the run, or it ends at level 0, diffusers sets lower_order_final for good; a plan takes
it for set. Noise, by sde-dpmsolver++, is drawn in every step of a group. "dpmsolver" with thresholding fails in diffusers and is
refused. In diffusers the sigmas are fp32 as here; what comes of them is fp32 there, fp64 here.

"x1", "x2" are the samples of one and two steps ago. Derived is m0. Outputs: prev_sample, m0.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, conversion, solver_levels, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.dpmsolver import SOLVERS, SYNONYMS, weights
from mmgen_kernels.schedule.planner.floats import div, f32
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, Form, column, matrix
from mmgen_kernels.schedule.planner.solver_levels import Level

TAKES = ("num_inference_steps", "timesteps", "mu", "begin")
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")


def schedule(config: Config, run: Run) -> Schedule:
    if (run.num_inference_steps is None) == (run.timesteps is None):
        raise ValueError(
            f"one of num_inference_steps and timesteps must be given, got {run.num_inference_steps} and {run.timesteps}"
        )
    if run.timesteps is not None and (kind := sigma_space.chosen_respacing(config)):
        raise ValueError(f"timesteps cannot be given where {kind} decides them, got {run.timesteps}")
    shift, alphas = solver_levels.flow_shift(config, run), betas.alphas_cumprod(config)
    table = sigma_space.training_sigmas(alphas)
    if run.timesteps is not None:
        times: list[float] = [int(t) for t in run.timesteps]
    else:
        seen = len(table) - solver_levels.clipped(config, alphas)
        times = [*spacing.above_zero({**config, "timestep_spacing": "linspace"}, run.num_inference_steps or 0, seen)]
    sigmas, times, _ = solver_levels.spaced(config, len(times), times, table, shift)
    sigmas = [f32(sigma) for sigma in (*sigmas, sigma_space.last_sigma(config, table[0]))]
    return Schedule(tuple(int(t) for t in times), "int64", sigmas=tuple(sigmas))


def whole_groups(config: Config, steps: int) -> bool:
    """Whether a run may be of groups of solver_order alone."""
    return not config["lower_order_final"] and steps % config["solver_order"] == 0 and config["final_sigmas_type"] != "zero"


def order_list(config: Config, steps: int) -> list[int]:
    """Of each step its place in its group, from 1 on, which is the order it has."""
    order = config["solver_order"]
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order must be 1, 2 or 3, got {order}")
    places = [1 + i % order for i in range(steps)]
    if whole_groups(config, steps):
        return places
    if steps and steps % order == 0:  # the last group gives its last step away
        places[-1] = 1
    if config["final_sigmas_type"] == "zero":
        places[-1] = 1
    return places


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    algorithm = SYNONYMS.get(config["algorithm_type"], config["algorithm_type"])
    solver, steps = SYNONYMS.get(config["solver_type"], config["solver_type"]), len(levels.timesteps)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm_type must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver_type must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if algorithm == "dpmsolver" and config["final_sigmas_type"] == "zero":
        raise ValueError("final_sigmas_type zero is not taken by algorithm_type dpmsolver, which takes sigma_min")
    if algorithm == "dpmsolver" and config["thresholding"]:
        raise ValueError("thresholding is not taken by algorithm_type dpmsolver: diffusers fails there")
    points = [Level(sigma, config["use_flow_sigmas"]) for sigma in sigma_space.of_levels(levels)]
    inputs = ("sample", "model_output", "x1", "m1", "x2", "m2")[: 2 * min(config["solver_order"], 3)]
    rows, orders = [], order_list(config, steps)
    for i in range(run.begin, steps):
        order = min(orders[i], i - run.begin + 1)
        group = [points[i - j] for j in range(order)]  # this level, the ones before
        rows.append(
            matrix(inputs, converted(config, algorithm, points[i]), update(algorithm, solver, points[i + 1], group), DERIVED)
        )
    feeds = {"x1": "sample", "m1": "m0", "x2": "x1", "m2": "m1"}
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "m0"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(algorithm == "sde-dpmsolver++",) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        feeds={name: feeds[name] for name in inputs[2:]},
        channels=3 if config["variance_type"] in ("learned", "learned_range") and config["prediction_type"] == "epsilon" else None,
        **clip(config),
    )


def converted(config: Config, algorithm: str, at: Level) -> Form:
    if algorithm.endswith("++"):
        return solver_levels.original(config, at)
    return conversion.epsilon(config["prediction_type"], at.alpha, at.sigma, conversion.VARIANCE_PRESERVING)


def update(algorithm: str, solver: str, to: Level, group: list[Level]) -> Form:
    first, order = group[-1], len(group)
    h = to.log_snr - first.log_snr
    of_differences, carried, noise = weights(algorithm, solver, to, first, h, order)
    outputs = [DERIVED, column("m1"), column("m2")][:order]
    x = carried * [SAMPLE, column("x1"), column("x2")][order - 1] + of_differences[0] * outputs[-1]
    ratios = [div(level.log_snr - first.log_snr, h) for level in group[:-1]]
    slopes = [(output - outputs[-1]) / r for output, r in zip(outputs, ratios, strict=False)]  # the last step's, the one's before
    if order == 3 and solver == "heun":
        apart = ratios[0] - ratios[1]
        x = x + div(2 * of_differences[2], apart) * (slopes[0] - slopes[1])
        x = x + div(of_differences[1], apart) * (ratios[0] * slopes[1] - ratios[1] * slopes[0])
    elif order > 1:
        x = x + of_differences[1] * slopes[0]
    return x + noise * NOISE if algorithm == "sde-dpmsolver++" else x
