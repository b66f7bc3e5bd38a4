"""What runs in 16 bits lose: the error of their last sample, against fp64 throughout, ours beside diffusers'.

A sample in 16 bits is rounded in every step, whoever computes it, and where the roundings of a run fall depends on its levels.
Between runs of one schedule that start elsewhere the ratio of two samplers' errors varies by 0.1 %, between runs of other lengths
by 0.4 to 3 %: one schedule tells nothing. So the errors are those of runs of many lengths, and their ratio has a standard error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import samplers
from benchmarks.peers.samplers import Sampler

SEED = 2026
SHAPE = (1, 4, 64, 64)


def lengths(sampler: Sampler) -> range:
    """Of its runs: of 30 steps from 10 to 60, of 8 from 2 to 16."""
    return range(sampler.steps // 3, 2 * sampler.steps + 1, 2)


def sampled(scheduler: Any, sampler: Sampler, start: Tensor) -> Tensor:
    """The last sample of a run with a perfect model."""
    torch.manual_seed(SEED)
    scheduler.set_timesteps(sampler.steps, device=start.device)
    x = start * getattr(scheduler, "init_noise_sigma", 1.0)
    told = sampler.class_name == "CogVideoXDPMScheduler"  # of the step before, by the caller
    before: dict[str, Any] = {"old_pred_original_sample": None, "timestep_back": None} if told else {}
    for k, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = samplers.prediction(sampler, scheduler, k, seen)
        x, *others = scheduler.step(output, timestep=t, sample=x, **before, return_dict=False)
        before = {"old_pred_original_sample": others[0], "timestep_back": t} if told else {}
    return x


def exact(sampler: Sampler, start: Tensor) -> Tensor:
    """The same in fp64 and by the reference, with the noise of a run in start's dtype."""
    import mmgen_kernels as mk

    scheduler, drawn = samplers.ours(sampler), torch.float32 if sampler.wide_noise else start.dtype
    scheduler.stepper.draw = lambda _, like, *__: torch.randn(like.shape, dtype=drawn, device=like.device).double()
    with mk.use_backend("reference"):
        return sampled(scheduler, sampler, start.double())


class Losses:
    """Of runs of every length, each with a start of its own."""

    def __init__(self, sampler: Sampler, dtype: torch.dtype, device: torch.device):
        self.sampler, self.dtype, self.device = sampler, dtype, device

    @functools.cached_property
    def runs(self) -> list[tuple[Sampler, Tensor]]:
        generator, place = torch.Generator().manual_seed(0), (self.device, self.dtype)
        return [(replace(self.sampler, steps=n), torch.randn(SHAPE, generator=generator).to(*place)) for n in lengths(self.sampler)]

    @functools.cached_property
    def truths(self) -> list[Tensor]:
        return [exact(sampler, start) for sampler, start in self.runs]

    @torch.no_grad()
    def of(self, make: Callable[[Sampler], Any]) -> Tensor:
        """Relative rms errors, (lengths,), of the schedulers that `make` makes."""
        ends = [sampled(make(sampler), sampler, start).double() for sampler, start in self.runs]
        off = [(end - true).square().mean() / true.square().mean() for end, true in zip(ends, self.truths, strict=True)]
        return torch.stack(off).sqrt().cpu()


def mean_of(errors: Tensor) -> float:
    """Geometric: the ratio of two means is the mean ratio."""
    return errors.log().mean().exp().item()


def standard_error_of(ratios: Tensor) -> float:
    """Of their geometric mean, relative."""
    return (ratios.log().std() / len(ratios) ** 0.5).item()
