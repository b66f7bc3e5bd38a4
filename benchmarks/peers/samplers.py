"""Samplers by their short names, ours and diffusers' (Apache-2.0), whose classes, attributes and arguments are the same."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
UNCLIPPED = LATENT | {"clip_sample": False}


@dataclass(frozen=True)
class Sampler:
    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    reads: int = 2  # tensors of a step
    writes: int = 2
    noisy: bool = False
    wide_data: bool = False  # the predicted data that it returns are fp32 at least
    wide_noise: bool = False  # so is the noise that it draws
    steps: int = 30


SAMPLERS = {
    "DDIM": Sampler("DDIMScheduler", UNCLIPPED),
    "Euler": Sampler("EulerDiscreteScheduler", LATENT, wide_data=True),
    "DPM++2M": Sampler("DPMSolverMultistepScheduler", LATENT, reads=3),
    "UniPC": Sampler("UniPCMultistepScheduler", LATENT, reads=5, writes=3),
    "EulerAncestral": Sampler("EulerAncestralDiscreteScheduler", LATENT, noisy=True, wide_data=True),
    "DDPM": Sampler("DDPMScheduler", UNCLIPPED, noisy=True),
    "LCM": Sampler("LCMScheduler", UNCLIPPED, noisy=True, steps=8),
    "FlowMatchEuler": Sampler("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, writes=1),
}

FURTHER = {  # raced for what a run loses in 16 bits alone
    "PNDM": Sampler("PNDMScheduler", LATENT | {"skip_prk_steps": True}, reads=5, writes=1),
    "PNDM-prk": Sampler("PNDMScheduler", LATENT, reads=5, writes=1),
    "DDIMInverse": Sampler("DDIMInverseScheduler", UNCLIPPED),
    "LMS": Sampler("LMSDiscreteScheduler", LATENT, reads=5, writes=3),
    "Heun": Sampler("HeunDiscreteScheduler", LATENT, reads=3, writes=3),
    "KDPM2": Sampler("KDPM2DiscreteScheduler", LATENT, reads=3),
    "KDPM2Ancestral": Sampler("KDPM2AncestralDiscreteScheduler", LATENT, reads=3, noisy=True),
    "EDMEuler": Sampler("EDMEulerScheduler", wide_data=True),
    "EDM-DPM++2M": Sampler("EDMDPMSolverMultistepScheduler", reads=3),
    "DEIS": Sampler("DEISMultistepScheduler", LATENT, reads=3),
    "DPM++2S": Sampler("DPMSolverSinglestepScheduler", LATENT, reads=4),
    "SA": Sampler("SASolverScheduler", LATENT, reads=5, writes=3, noisy=True),
    "TCD": Sampler("TCDScheduler", LATENT, noisy=True, steps=8),
    "CogVideoXDDIM": Sampler("CogVideoXDDIMScheduler"),
    "CogVideoXDPM": Sampler("CogVideoXDPMScheduler", reads=3, noisy=True),
    "FlowMatchHeun": Sampler("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, reads=3),
    "FlowMatchLCM": Sampler("FlowMatchLCMScheduler", {"shift": 3.0}, writes=1, noisy=True, wide_noise=True, steps=8),
    "CM": Sampler("CMStochasticIterativeScheduler", {"clip_denoised": False}, writes=1, noisy=True, steps=8),
}


def ours(sampler: Sampler, noise: str = "torch") -> Any:
    import mmgen_kernels as mk

    return getattr(mk.schedulers, sampler.class_name).from_config(sampler.config, noise=noise)


def stock(sampler: Sampler) -> Any:
    diffusers = importlib.import_module("diffusers")
    return getattr(diffusers, sampler.class_name).from_config(sampler.config)


def begin(scheduler: Any) -> None:
    """To the first step of its run."""
    scheduler._begin_index, scheduler._step_index = 0, None
    scheduler.is_scale_input_called = True
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs, scheduler.lower_order_nums = [None] * scheduler.config["solver_order"], 0
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample, scheduler.this_order = None, 0


def enter(scheduler: Any, k: int, past: tuple[Tensor, ...]) -> None:
    """To step k of its run, with `past` for a history."""
    scheduler._step_index = k
    scheduler.is_scale_input_called = True  # else Euler warns in every call, which takes time
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs, scheduler.lower_order_nums = list(past[:2]), 2
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample, scheduler.this_order = past[2], 2


def level(sampler: Sampler, scheduler: Any, k: int) -> tuple[float, float]:
    """How much data and how much noise the model sees at step k."""
    if sampler.class_name.startswith(("DDPM", "DDIM", "LCM", "PNDM", "TCD", "CogVideoX")):
        kept = float(scheduler.alphas_cumprod[scheduler.timesteps[k]])
        return kept**0.5, (1 - kept) ** 0.5
    sigma = float(scheduler.sigmas[k])
    if sampler.class_name.startswith("Flow"):
        return 1 - sigma, sigma
    if sampler.class_name.startswith("KDPM2D") and k % 2:  # a step's second evaluation, between two levels
        sigma = (sigma * float(scheduler.sigmas[k - 1])) ** 0.5
    deviation = scheduler.config.get("sigma_data", 1.0)
    return 1 / (deviation**2 + sigma**2) ** 0.5, sigma / (deviation**2 + sigma**2) ** 0.5


def prediction(sampler: Sampler, scheduler: Any, k: int, seen: Tensor) -> Tensor:
    """The perfect model's, of data that are normal around a wave with deviation 1/2: computed in fp64, of seen's dtype."""
    a, s = level(sampler, scheduler, k)
    x = seen.double()
    wave = torch.sin(torch.arange(x[0].numel(), dtype=torch.float64, device=x.device)).view(x.shape[1:])
    data = wave + a * 0.25 / (a * a * 0.25 + s * s) * (x - a * wave)
    if sampler.class_name.startswith(("EDM", "CM")):  # a network that is preconditioned
        sigma, d = s / a, scheduler.config["sigma_data"]
        least = scheduler.config["sigma_min"] if sampler.class_name.startswith("CM") else 0.0
        skip, out = d**2 / ((sigma - least) ** 2 + d**2), (sigma - least) * d * a
        return ((data - skip * x / a) / out).to(seen.dtype)
    noise = (x - a * data) / s
    return (noise - data if sampler.class_name.startswith("Flow") else noise).to(seen.dtype)
