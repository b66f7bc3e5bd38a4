"""add_noise and its kin, for any object with the attributes that diffusers' schedulers have; none waits for a device.

A copy from the host would: tables are copied once, and stay where they were wanted for as long as the scheduler has them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.ops import add_noise
from mmgen_kernels.schedule.schedulers.stepper import version_of

# of each scheduler, by attribute, what is made of it, and device: the attribute, its version then, and the table there
_kept: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[Tensor, int, Tensor]]] = weakref.WeakKeyDictionary()


def as_it_is(levels: Tensor) -> Tensor:
    return levels


def on_device(s: Any, name: str, device: torch.device, made: Callable[[Tensor], Tensor] = as_it_is) -> Tensor:
    """What is made of the scheduler's attribute `name`, on the device."""
    held = getattr(s, name)
    if torch.compiler.is_compiling():
        return made(held).to(device)
    tables = _kept.setdefault(s, {})
    kept = tables.get((name, made, device))
    if kept is not None and kept[0] is held and kept[1] == version_of(held):
        return kept[2]
    with torch.inference_mode(False):
        table = made(held).to(device)
    version = version_of(held)
    if version is not None and type(table) is Tensor:  # neither of inference mode nor a fake
        tables[name, made, device] = held, version, table
    return table


def by_alphas(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor, target: str = "epsilon") -> Tensor:
    """sqrt(a) samples + sqrt(1 - a) noise with a = alphas_cumprod[timesteps]; or the target of that."""
    table = on_device(s, "alphas_cumprod", samples.device)
    times = timesteps.to(samples.device, non_blocking=True).long()
    x_t, of_target = add_noise(samples, noise, times.expand(samples.shape[:1]), path="vp", table=table, target=target)
    return x_t if target == "epsilon" else of_target


def velocity(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return by_alphas(s, samples, noise, timesteps, "v")


def by_sigma(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """samples + sigma noise"""
    return at_levels(s, samples, noise, timesteps, "edm")


def by_flow(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """(1 - sigma) samples + sigma noise"""
    return at_levels(s, samples, noise, timesteps, "linear")


def by_flow_at(s: Any, samples: Tensor, noise: Tensor, place: int) -> Tensor:
    """(1 - sigma) samples + sigma noise at one place of the schedule."""
    index = torch.full(samples.shape[:1], place, dtype=torch.int64, device=samples.device)
    return add_noise(samples, noise, index, path="linear", table=levels_of(s, "linear", samples.device))[0]


def by_alpha_and_sigma(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """alpha samples + sigma noise, alpha^2 + sigma^2 = 1 but for flows"""
    if s.config["use_flow_sigmas"]:
        return by_flow(s, samples, noise, timesteps)
    return at_levels(s, samples, noise, timesteps, "vp")


def at_levels(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor, path: str) -> Tensor:
    """By the levels of timesteps. One that is not in the schedule gives NaN: to raise, a look at it would stop the GPU."""
    index, levels = indices_of(s, timesteps, samples.device).expand(samples.shape[:1]), levels_of(s, path, samples.device)
    return add_noise(samples, noise, torch.where(index < 0, len(levels) - 1, index), path=path, table=levels)[0]


def levels_of(s: Any, path: str, device: torch.device) -> Tensor:
    """What add_noise takes as the table of a path; and NaN behind it."""
    return on_device(s, "sigmas", device, alphas_and_nan if path == "vp" else sigmas_and_nan)


def sigmas_and_nan(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas.double(), sigmas.new_full((1,), torch.nan, dtype=torch.float64)))


def alphas_and_nan(sigmas: Tensor) -> Tensor:
    return 1 / (1 + sigmas_and_nan(sigmas).square())


def indices_of(s: Any, timesteps: Tensor, device: torch.device) -> Tensor:
    """Of each timestep its place in the schedule, (B,): of two equal ones the second, as in diffusers; -1 if it is not there."""
    if s.begin_index is not None:  # image to image, or inpainting in the middle of a run
        place = s.begin_index if s.step_index is None else s.step_index
        return torch.full(timesteps.shape, place, dtype=torch.int64, device=device)
    schedule = on_device(s, "timesteps", device)
    same = timesteps.to(device, schedule.dtype, non_blocking=True)[:, None] == schedule  # (B, S)
    number = same.cumsum(1)
    wanted = number[:, -1:].clamp(max=2)
    return torch.where(wanted[:, 0] == 0, -1, ((number == wanted) & same).int().argmax(1))
