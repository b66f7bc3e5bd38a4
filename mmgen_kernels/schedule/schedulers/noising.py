"""add_noise and its kin, for any object with the attributes that diffusers' schedulers have; none waits for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.ops import add_noise


def by_alphas(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor, target: str = "epsilon") -> Tensor:
    """sqrt(a) samples + sqrt(1 - a) noise with a = alphas_cumprod[timesteps]; or the target of that."""
    table, times = s.alphas_cumprod.to(samples.device), timesteps.to(samples.device).long()
    x_t, of_target = add_noise(samples, noise, times.expand(samples.shape[:1]), path="vp", table=table, target=target)
    return x_t if target == "epsilon" else of_target


def velocity(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return by_alphas(s, samples, noise, timesteps, "v")


def by_sigma(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """samples + sigma noise"""
    return at_levels(s, samples, noise, timesteps, "edm", s.sigmas)


def by_flow(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """(1 - sigma) samples + sigma noise"""
    return at_levels(s, samples, noise, timesteps, "linear", s.sigmas)


def by_flow_at(s: Any, samples: Tensor, noise: Tensor, place: int) -> Tensor:
    """(1 - sigma) samples + sigma noise at one place of the schedule."""
    index = torch.full(samples.shape[:1], place, dtype=torch.int64, device=samples.device)
    return add_noise(samples, noise, index, path="linear", table=s.sigmas.to(samples.device))[0]


def by_alpha_and_sigma(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """alpha samples + sigma noise, alpha^2 + sigma^2 = 1 but for flows"""
    if s.config["use_flow_sigmas"]:
        return by_flow(s, samples, noise, timesteps)
    return at_levels(s, samples, noise, timesteps, "vp", 1 / (1 + s.sigmas.double().square()))


def at_levels(s: Any, samples: Tensor, noise: Tensor, timesteps: Tensor, path: str, table: Tensor) -> Tensor:
    """By the levels of timesteps. One that is not in the schedule gives NaN: to raise, a look at it would stop the GPU."""
    index = indices_of(s, timesteps, samples.device).expand(samples.shape[:1])
    levels = torch.cat((table.double(), table.new_full((1,), torch.nan, dtype=torch.float64))).to(samples.device)
    return add_noise(samples, noise, torch.where(index < 0, len(table), index), path=path, table=levels)[0]


def indices_of(s: Any, timesteps: Tensor, device: torch.device) -> Tensor:
    """Of each timestep its place in the schedule, (B,): of two equal ones the second, as in diffusers; -1 if it is not there."""
    if s.begin_index is not None:  # image to image, or inpainting in the middle of a run
        place = s.begin_index if s.step_index is None else s.step_index
        return torch.full(timesteps.shape, place, dtype=torch.int64, device=device)
    schedule = s.timesteps.to(device)
    same = timesteps.to(device, schedule.dtype)[:, None] == schedule  # (B, S)
    number = same.cumsum(1)
    wanted = number[:, -1:].clamp(max=2)
    return torch.where(wanted[:, 0] == 0, -1, ((number == wanted) & same).int().argmax(1))
