"""
DEISMultistepScheduler, Zhang and Chen 2023, in log rho and of orders 1 to 3. With rho = sigma / alpha, m0 the noise in the sample
and l_j the Lagrange polynomials of log rho at this level and the ones before:

    x' = alpha' / alpha x + alpha' sum_j m_j integral of l_j(log r) dr from rho to rho'

In diffusers the sigmas are fp32 as here, spaced in fp64 before that as here; alpha, rho and all that comes of them are fp32 there,
fp64 here. A run ends at the least training level, where levels are respaced or a flow's at the last of them once more: a step that
leads nowhere. Derived is x0 where it is thresholded, else m0. Outputs: prev_sample, m0.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, solver_levels, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, f32
from mmgen_kernels.schedule.planner.forms import DERIVED, MODEL_OUTPUT, SAMPLE, Form, column, matrix
from mmgen_kernels.schedule.planner.solver_levels import Level
from mmgen_kernels.schedule.planner.special import exponential_adams

TAKES = ("num_inference_steps", "mu", "begin")
ALGORITHMS = ("deis", "dpmsolver", "dpmsolver++")  # the others' names mean deis here
SOLVERS = ("logrho", "midpoint", "heun", "bh1", "bh2")


def schedule(config: Config, run: Run) -> Schedule:
    if run.num_inference_steps is None:
        raise ValueError("num_inference_steps must be given for DEISMultistepScheduler, got None")
    steps, shift = run.num_inference_steps, solver_levels.flow_shift(config, run)
    table = sigma_space.training_sigmas(betas.alphas_cumprod(config))
    times: list[float] = [*spacing.above_zero(config, steps, config["num_train_timesteps"])]
    sigmas, times, respaced = solver_levels.spaced(config, steps, times, table, shift)
    sigmas = [f32(sigma) for sigma in (*sigmas, sigmas[-1] if respaced else table[0])]
    return Schedule(tuple(int(t) for t in times), "int64", sigmas=tuple(sigmas))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    for option, known in (("algorithm_type", ALGORITHMS), ("solver_type", SOLVERS)):
        if config[option] not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {config[option]!r}")
    clipping, steps, greatest = clip(config), len(levels.timesteps), min(max(config["solver_order"], 1), 3)
    points = [Level(sigma, config["use_flow_sigmas"]) for sigma in sigma_space.of_levels(levels)]
    inputs, rows = ("sample", "model_output", "m1", "m2")[: 1 + greatest], []
    for i in range(run.begin, steps):
        order = min(greatest, i - run.begin + 1)
        if config["lower_order_final"] and steps < 15:
            order = min(order, steps - i)
        original = solver_levels.original(config, points[i])
        derived, m0 = (original, noise(config, points[i], DERIVED)) if clipping else (noise(config, points[i], original), DERIVED)
        near = [points[i + 1 - j] for j in range(order + 1)]  # the level to reach, this one, those before
        rows.append(matrix(inputs, derived, update(near, m0), m0))
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "m0"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(False,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        feeds={"m1": "m0", "m2": "m1"} if greatest == 3 else {"m1": "m0"} if greatest == 2 else {},
        **clipping,
    )


def noise(config: Config, at: Level, original: Form) -> Form:
    """The noise that is left beside x0. Of an epsilon that nothing limits it is the model's own word, without the detour."""
    kind = config["prediction_type"]
    if kind == "epsilon" and original is not DERIVED:
        return MODEL_OUTPUT
    return (SAMPLE - at.alpha * original) / (at.level if kind == "flow_prediction" else at.sigma)


def update(near: list[Level], m0: Form) -> Form:
    to, at = near[:2]
    back = [to.log_snr - level.log_snr for level in near[1:]]  # from the end of the step, in which sigma' e^u is rho alpha'
    x = div(to.alpha, at.alpha) * SAMPLE
    outputs = [m0, column("m1"), column("m2")]
    for weight, output in zip(exponential_adams(back, back[0], 1.0), outputs, strict=False):
        x = x - to.sigma * weight * output
    return x
