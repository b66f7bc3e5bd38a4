"""Which of the training timesteps a run visits. Host arithmetic in fp64, rounded half to even, as numpy does it."""

from __future__ import annotations

import math

from mmgen_kernels.schedule.planner.contract import Config
from mmgen_kernels.schedule.planner.floats import f32

SPACINGS = ("linspace", "leading", "trailing")


def whole(config: Config, steps: int) -> list[int]:
    """DDPM's and DDIM's: whole timesteps, both ends of the training range included by "linspace"."""
    n, spacing = config["num_train_timesteps"], _spacing(config)
    if steps > n:
        raise ValueError(f"num_inference_steps must be at most num_train_timesteps {n}, got {steps}")
    if spacing == "linspace":
        return [round(t) for t in linspace(0, n - 1, steps)][::-1]
    return _leading(config, n, steps) if spacing == "leading" else _trailing(n, n / steps)


def fractional(config: Config, steps: int) -> list[float]:
    """Euler's: "linspace" is not rounded to whole timesteps, only to fp32."""
    n, spacing = config["num_train_timesteps"], _spacing(config)
    if spacing == "linspace":
        return [f32(t) for t in linspace(0, n - 1, steps)][::-1]
    return [f32(t) for t in (_leading(config, n, steps) if spacing == "leading" else _trailing(n, n / steps))]


def above_zero(config: Config, steps: int, last: int) -> list[int]:
    """DPM-Solver's and UniPC's: timestep 0 is left to the last level. `last` counts the timesteps that may be visited."""
    n, spacing = config["num_train_timesteps"], _spacing(config)
    if spacing == "linspace":
        return [round(t) for t in linspace(0, last - 1, steps + 1)][:0:-1]
    return _leading(config, last, steps + 1)[:-1] if spacing == "leading" else _trailing(last, n / steps)


def linspace(start: float, stop: float, count: int, endpoint: bool = True) -> list[float]:
    parts = count - 1 if endpoint else count
    step = (stop - start) / parts if parts else 0.0
    points = [i * step + start for i in range(count)]
    if endpoint and count > 1:
        points[-1] = float(stop)
    return points


def _spacing(config: Config) -> str:
    if config["timestep_spacing"] not in SPACINGS:
        raise ValueError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {config['timestep_spacing']!r}")
    return config["timestep_spacing"]


def _leading(config: Config, n: int, count: int) -> list[int]:
    return [i * (n // count) + config["steps_offset"] for i in range(count)][::-1]


def _trailing(n: int, step: float) -> list[int]:
    # How many points a range of floats has, and what it adds up, is numpy's arithmetic: n / (n / steps) may round to just above
    # steps, and then there is one more point, near 0, whose timestep is -1.
    apart = (n - step) - n
    return [round(n + i * apart) - 1 for i in range(math.ceil(n / step))]
