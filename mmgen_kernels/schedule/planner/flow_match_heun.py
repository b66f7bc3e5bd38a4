"""
FlowMatchHeunDiscreteScheduler, Heun's method for flows: two steps of the scheduler are one from level s to s', a sample being
(1 - s) x0 + s z and the model giving z - x0. With s^ = s (1 + gamma) and x^ = x + s_noise sqrt(s^^2 - s^2) z

    d  = s m / s^                           the first: x' = x^ + (s' - s^) d, for the model to see
    x' = x^ + (s' - s^) (d + m') / 2        the second

diffusers draws noise in the second step of a churned pair too, and none of it arrives; a model output times s / s is what it has
of m', which a level of 0 makes NaN. Every level but the first stands twice in the list; a run that begins at the second of the two
takes pairs of steps that lead nowhere, in diffusers too. In diffusers the levels are fp32 as here, spaced in fp64 before that as
here; the step from one to the next is fp32 there, fp64 here.

"last_sample" is x^ and "derivative" is d of the step before. Outputs: prev_sample, slope (d), and where noise is added start (x^).
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import flow_match
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, sqrt
from mmgen_kernels.schedule.planner.forms import MODEL_OUTPUT, NOISE, SAMPLE, Form, column, matrix

TAKES = ("num_inference_steps", "begin", "s_churn", "s_tmin", "s_tmax", "s_noise")
EULERS = dict.fromkeys(("use_dynamic_shifting", "invert_sigmas", *sigma_space.RESPACINGS), False) | {"shift_terminal": None}
NOTHING = Form({})


def schedule(config: Config, run: Run) -> Schedule:
    once = flow_match.schedule(EULERS | dict(config), run)
    sigmas = sigma_space.of_levels(once)
    return Schedule(twice(once.timesteps), "float32", (*twice(sigmas[:-1]), sigmas[-1]))


def twice(values: tuple[float, ...]) -> tuple[float, ...]:
    """All but the first."""
    return values[:1] + tuple(value for value in values[1:] for _ in range(2))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    sigmas, rows, churned = sigma_space.of_levels(levels), [], []
    inputs = ("sample", "model_output", "last_sample", "derivative")
    for i in range(run.begin, len(levels.timesteps)):
        second = (i - run.begin) % 2
        s, to = sigmas[i - second : i - second + 2]
        gamma = min(run.s_churn / (len(sigmas) - 1), 2**0.5 - 1) if run.s_tmin <= s <= run.s_tmax else 0.0
        hat = s * (gamma + 1)
        churned.append(gamma > 0)
        if second:
            slope = 0.5 * (column("derivative") + div(to, to) * MODEL_OUTPUT)
            lines = [column("last_sample") + (to - hat) * slope, NOTHING, NOTHING]
        else:
            start = SAMPLE + sqrt(hat**2 - s**2) * run.s_noise * NOISE if gamma > 0 else SAMPLE
            slope = div(s, hat) * MODEL_OUTPUT
            lines = [start + (to - hat) * slope, slope, start]
        rows.append(lines)
    outputs = ("prev_sample", "slope", "start")[: 3 if any(churned) else 2]
    return Plan(
        inputs=inputs,
        outputs=outputs,
        rows=[matrix(inputs, NOTHING, *lines[: len(outputs)]) for lines in rows],
        schedule=levels,
        begin=run.begin,
        draws_noise=tuple(churned),
        scale_model_input=(1.0,) * len(rows),
        feeds={"last_sample": "start" if any(churned) else "sample", "derivative": "slope"},
    )
