"""
What Heun's method and KDPM2 share, which ask the model twice for a step: once where the step begins, and once further on, whence
it begins anew with what the second answer tells.

A run of n steps has 2 n - 1 evaluations: the last step, to level 0, is Euler's. Every level but the first stands twice in
`sigmas`, so that evaluation i, an even one, goes from sigmas[i] towards sigmas[i + 1], and the odd one after it once more.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmgen_kernels.schedule.planner import spacing
from mmgen_kernels.schedule.planner.contract import Config, Run, Schedule
from mmgen_kernels.schedule.planner.variance_preserving import one_list


def times_of_run(config: Config, run: Run) -> tuple[list[float], int]:
    """Timesteps before any respacing, and the number of steps."""
    one_list(run)
    if run.timesteps is not None:
        return [float(t) for t in run.timesteps], len(run.timesteps)
    steps, n = run.num_inference_steps or 0, run.num_train_timesteps or config["num_train_timesteps"]
    return spacing.fractional({**config, "num_train_timesteps": n}, steps), steps


def twice(values: list[float]) -> list[float]:
    """Each but the first a second time."""
    return [*values[:1], *(v for value in values[1:] for v in (value, value))]


def evaluations(run: Run, levels: Schedule) -> Iterator[tuple[int, bool]]:
    """The evaluations that run, and whether each is the first of a step. So they alternate from wherever the run begins."""
    return ((i, (i - run.begin) % 2 == 0) for i in range(run.begin, len(levels.timesteps)))
