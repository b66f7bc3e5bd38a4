"""
PNDMScheduler, Liu et al. 2022: a transfer from timestep t to t' (their equation 9),

    x' = sqrt(a' / a) x - (a' - a) e / (a sqrt(1 - a') + sqrt(a (1 - a) a'))

with a, a' alphas_cumprod there, and e put together of what the model says of the noise (of v: sqrt(a) e + sqrt(1 - a) x):

    prk     Runge and Kutta's four evaluations m_1 ... m_4 of a step, each from its beginning: m_1, m_2, m_3 alone, and then
            m_1 / 6 + m_2 / 3 + m_3 / 3 + m_4 / 6, where the first three are in `total`
    plms    (55 m0 - 59 m1 + 37 m2 - 9 m3) / 24, or with a shorter past (23 m0 - 16 m1 + 5 m2) / 12, (3 m0 - m1) / 2; and with none
            m0, after which the same step is done once more with (m0 + m1) / 2

Three steps of prk begin a run, unless skip_prk_steps. How far a step goes is read off the number of steps, not off the next
timestep, as in diffusers, where alphas_cumprod is fp32, as here, and so is what it computes from it, which is fp64 here. Outputs:
prev_sample, total.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import betas, spacing
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.conversion import check
from mmgen_kernels.schedule.planner.floats import div, sqrt
from mmgen_kernels.schedule.planner.forms import MODEL_OUTPUT, SAMPLE, Form, column, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_timesteps, of_levels, steps_of

TAKES = ("num_inference_steps", "begin", "counter", "kept", "method")
PREDICTIONS = ("epsilon", "v_prediction")
CYCLE = 4  # evaluations of a Runge-Kutta step, and levels that three of them join
INPUTS = ("sample", "model_output", "last_sample", "total", "m1", "m2", "m3")
PAST = tuple(column(f"m{j}") for j in range(1, 5))
ADAMS = {  # of so many outputs, m0 first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def timesteps_of(config: Config, steps: int) -> tuple[list[int], list[int]]:
    """Those of prk and those of plms."""
    times = spacing.whole(config, steps)[::-1]
    if config["skip_prk_steps"]:
        return [], [*times[:-1], *times[-2:-1], *times[-1:]][::-1]
    if len(times) < CYCLE:
        raise ValueError(f"num_inference_steps must be at least {CYCLE} without skip_prk_steps, got {steps}")
    half = config["num_train_timesteps"] // steps // 2
    joined = [t for time in times[-CYCLE:] for t in (time, time + half)][:-1]
    return [t for time in joined for t in (time, time)][-2:0:-1], times[:-3][::-1]


def kept_before(counter: int, prk: int) -> int:
    """How many outputs are kept when evaluation `counter` of a run comes, whose first `prk` are Runge and Kutta's."""
    if counter < prk:
        return -(-counter // CYCLE)
    return min(counter - prk + 3 if prk else max(counter - 1, min(counter, 1)), CYCLE)


def schedule(config: Config, run: Run) -> Schedule:
    alphas = betas.alphas_cumprod(config).tolist()
    prk, plms = timesteps_of(config, steps_of(run, "PNDMScheduler"))
    check_timesteps([*prk, *plms], len(alphas))
    return Schedule((*prk, *plms), "int64", alphas_cumprod=tuple(alphas))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    """Rows of a run that begins with `counter` evaluations and `kept` outputs behind it, by `method`, or as `step` chooses."""
    steps = steps_of(run, "PNDMScheduler")
    check(config["prediction_type"], PREDICTIONS)
    prk, _ = timesteps_of(config, steps) if run.method != "plms" else ([], [])
    rows, feeds, kept = [], [], run.kept
    for counter, time in enumerate(levels.timesteps[run.begin :], run.counter):
        if run.method == "prk" or (run.method is None and counter < len(prk)):
            row, feed = _runge_kutta(config, levels, prk, counter, int(time), steps)
        else:
            row, feed = _adams(config, levels, counter, kept, int(time), steps)
        rows.append(row)
        feeds.append(dict(zip(INPUTS[2:], INPUTS[2:], strict=True)) | feed)
        kept = min(kept + ("m1" in feed), CYCLE)
    inputs = tuple(dict.fromkeys((*INPUTS, *(name for row in rows for name in row.used))))
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "total"),
        rows=[row.over(inputs) for row in rows],
        schedule=levels,
        begin=run.begin,
        draws_noise=(False,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        feeds=tuple(feeds),
    )


class Evaluation:
    """What an evaluation of the model makes of prev_sample and total."""

    def __init__(self, prev: Form, total: Form | None = None) -> None:
        self.prev, self.total = prev, total or Form({})
        self.used = tuple(self.prev.terms)

    def over(self, inputs: tuple[str, ...]) -> list[list[float]]:
        return matrix(inputs, Form({}), self.prev, self.total)


NEW = {"m1": "model_output", "m2": "m1", "m3": "m2"}


def _runge_kutta(
    config: Config, levels: Schedule, prk: list[int], counter: int, time: int, steps: int
) -> tuple[Evaluation, dict[str, str]]:
    phase, start = counter % CYCLE, counter // CYCLE * CYCLE
    if start >= len(prk):
        raise ValueError(f"counter must be below the {len(prk)} evaluations of prk, got {counter}")
    to = time - (0 if counter % 2 else config["num_train_timesteps"] // steps // 2)
    x = column("last_sample") if phase else SAMPLE
    total = column("total") if phase else Form({})
    if phase == 3:
        return Evaluation(_transfer(config, levels, prk[start], to, x, total + (1 / 6) * MODEL_OUTPUT)), {}
    prev = _transfer(config, levels, prk[start], to, x, MODEL_OUTPUT)
    share = (1 / 3 if phase else 1 / 6) * MODEL_OUTPUT
    return Evaluation(prev, total + share), {"total": "total"} if phase else {"total": "total", "last_sample": "sample", **NEW}


def _adams(config: Config, levels: Schedule, counter: int, kept: int, time: int, steps: int) -> tuple[Evaluation, dict[str, str]]:
    apart = config["num_train_timesteps"] // steps
    if not config["skip_prk_steps"] and kept < 3:
        raise ValueError(f"plms must have 3 outputs of prk before it without skip_prk_steps, got {kept}")
    if kept == 0 and counter > 0:
        raise ValueError(f"plms must have outputs before it in evaluation {counter}, got none")
    if counter == 1:  # the first step once more, or with what is kept alone where that is more
        e = 0.5 * (MODEL_OUTPUT + PAST[0]) if kept == 1 else _combined(PAST[: min(kept, CYCLE)])
        x = column("last_sample") if kept == 1 else SAMPLE
        return Evaluation(_transfer(config, levels, time + apart, time, x, e)), {}
    outputs = (MODEL_OUTPUT, *PAST[: min(kept, CYCLE - 1)])
    feed = NEW | ({"last_sample": "sample"} if len(outputs) == 1 else {})
    return Evaluation(_transfer(config, levels, time, time - apart, SAMPLE, _combined(outputs))), feed


def _combined(outputs: tuple[Form, ...]) -> Form:
    return sum((c * output for c, output in zip(ADAMS[len(outputs)], outputs, strict=True)), Form({}))


def _transfer(config: Config, levels: Schedule, time: int, to: int, x: Form, e: Form) -> Form:
    alphas = of_levels(levels)
    check_timesteps([time, max(to, 0)], len(alphas))
    a = alphas[time]
    b = alphas[to] if to >= 0 else 1.0 if config["set_alpha_to_one"] else alphas[0]
    if config["prediction_type"] == "v_prediction":
        e = sqrt(a) * e + sqrt(1 - a) * x
    return sqrt(div(b, a)) * x - div(b - a, a * sqrt(1 - b) + sqrt(a * (1 - a) * b)) * e
