"""
Noise levels sigma = sqrt(1 - alphas_cumprod) / sqrt(alphas_cumprod) of a run.

diffusers holds the training sigmas in fp32, interpolates and respaces in fp64 (numpy), and rounds the result to fp32.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from mmgen_kernels.schedule.planner.betas import SCHEDULES, alphas_cumprod
from mmgen_kernels.schedule.planner.contract import Config, Schedule
from mmgen_kernels.schedule.planner.floats import exp, f32, log, sqrt
from mmgen_kernels.schedule.planner.spacing import linspace
from mmgen_kernels.schedule.planner.special import beta_ppf

RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def training_sigmas(alphas: Tensor) -> list[float]:
    """Ascending, values of fp32."""
    return (((1 - alphas) / alphas) ** 0.5).tolist()


def of_levels(levels: Schedule) -> tuple[float, ...]:
    if levels.sigmas is None or len(levels.sigmas) <= len(levels.timesteps):
        got = None if levels.sigmas is None else f"{len(levels.sigmas)} for {len(levels.timesteps)} timesteps"
        raise ValueError(f"levels must have a sigma per timestep and a last one, got {got}")
    return levels.sigmas


def logs(sigmas: Sequence[float]) -> list[float]:
    return [f32(log(sigma)) for sigma in sigmas]


def last_sigma(config: Config, least: float) -> float:
    """What follows the last step: 0, or the least level."""
    if config["final_sigmas_type"] not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type must be zero or sigma_min, got {config['final_sigmas_type']!r}")
    return 0.0 if config["final_sigmas_type"] == "zero" else least


def start(config: Config, sigmas: Sequence[float]) -> float:
    """Euler's init_noise_sigma: the greatest level, of x0 + sigma z, whose x0 "leading" counts in too."""
    greatest = max(sigmas)
    return greatest if config["timestep_spacing"] in ("linspace", "trailing") else sqrt(greatest**2 + 1)


def interpolate(times: Sequence[float], table: Sequence[float]) -> list[float]:
    """Straight lines between table[0], table[1], ..., constant outside."""
    values = []
    for time in times:
        j = min(max(math.floor(time), 0), len(table) - 1)
        if j == len(table) - 1 or time <= 0:
            values.append(table[j])
        else:
            values.append((table[j + 1] - table[j]) * (time - j) + table[j])
    return values


def chosen_respacing(config: Config) -> str | None:
    chosen = [name for name in RESPACINGS if config[name]]
    if len(chosen) > 1:
        raise ValueError(f"at most one of {', '.join(RESPACINGS)} may be set, got {' and '.join(chosen)}")
    return chosen[0] if chosen else None


def respaced(config: Config, first: float, last: float, steps: int) -> list[float] | None:
    """`steps` levels from `first` to `last`, which sigma_max and sigma_min of the config replace; None without a respacing."""
    kind = chosen_respacing(config)
    if kind is None:
        return None
    least, greatest = config.get("sigma_min"), config.get("sigma_max")
    last, first = (last if least is None else least), (first if greatest is None else greatest)
    if kind == "use_karras_sigmas":
        return karras(first, last, steps)
    if kind == "use_exponential_sigmas":
        return [exp(x) for x in linspace(log(first), log(last), steps)]
    # Beta sampling, Lee et al. 2024: both ends are visited more densely than the middle.
    return [last + beta_ppf(1 - p, 0.6, 0.6) * (first - last) for p in linspace(0, 1, steps)]


def spaced(
    config: Config, times: list[float], steps: int, schedules: tuple[str, ...] = SCHEDULES
) -> tuple[list[float], list[float]]:
    """Levels without the last one, and timesteps: those of `times`, or where a respacing puts so many steps."""
    table = training_sigmas(alphas_cumprod(config, schedules))
    sigmas = interpolate(times, table)
    elsewhere = respaced(config, sigmas[0], sigmas[-1], steps)
    return (sigmas, times) if elsewhere is None else (elsewhere, times_of(elsewhere, logs(table)))


def karras(first: float, last: float, steps: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5: sigma^(1 / rho) in equal steps."""
    start, end = first ** (1 / rho), last ** (1 / rho)
    return [(start + ramp * (end - start)) ** rho for ramp in linspace(0, 1, steps)]


def time_of(log_sigma: float, log_sigmas: Sequence[float]) -> float:
    """The training timestep, with a fraction, whose level this is: straight lines in log sigma, clamped to the table."""
    return _time_from(max((j for j, value in enumerate(log_sigmas) if log_sigma >= value), default=0), log_sigma, log_sigmas)


def _time_from(low: int, log_sigma: float, log_sigmas: Sequence[float]) -> float:
    low = min(low, len(log_sigmas) - 2)
    share = (log_sigmas[low] - log_sigma) / (log_sigmas[low] - log_sigmas[low + 1])
    share = min(max(share, 0.0), 1.0)
    return (1 - share) * low + share * (low + 1)


def times_of(sigmas: Sequence[float], log_sigmas: Sequence[float]) -> list[float]:
    return times_of_logs([log(max(sigma, 1e-10)) for sigma in sigmas], log_sigmas)


def times_of_logs(logarithms: Sequence[float], log_sigmas: Sequence[float]) -> list[float]:
    if any(later < value for value, later in pairwise(log_sigmas)):
        return [time_of(value, log_sigmas) for value in logarithms]
    return [_time_from(max(bisect_right(log_sigmas, value) - 1, 0), value, log_sigmas) for value in logarithms]
