"""
The training schedule: alphas_cumprod[t], the share of the signal's power that is left at training timestep t.

diffusers holds betas, alphas and their products in fp32, and rescaling for a zero terminal SNR is done in fp32 too. The same fp32
operations of torch are done here, on the CPU, so that the levels are the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner.contract import Config

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
LEAST_ALPHA = 2.0**-24  # classes in sigma space put this where a zero terminal SNR has 0: the smallest subnormal of fp16


def alphas_cumprod(config: Config, schedules: tuple[str, ...] = SCHEDULES, terminal: float | None = None) -> Tensor:
    """fp32 (num_train_timesteps,). `terminal` replaces the last entry where the betas are rescaled for a zero terminal SNR."""
    betas, rescaled = of_config(config, schedules), config.get("rescale_betas_zero_snr", False)
    if rescaled:
        betas = _zero_terminal_snr(betas)
    product = torch.cumprod(1.0 - betas, dim=0)
    if rescaled and terminal is not None:
        product[-1] = terminal
    return product


def of_config(config: Config, schedules: tuple[str, ...] = SCHEDULES, dtype: torch.dtype = torch.float32) -> Tensor:
    """Betas, (num_train_timesteps,). `dtype` is that of "linear" and "scaled_linear"."""
    if config["trained_betas"] is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float32, device="cpu")
    kind, start, end, n = (config[key] for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps"))
    if kind not in schedules:
        raise ValueError(f"beta_schedule must be one of {', '.join(schedules)}, got {kind!r}")
    if kind == "linear":
        return _linspace(start, end, n, dtype)
    if kind == "scaled_linear":
        return _linspace(start**0.5, end**0.5, n, dtype) ** 2
    if kind == "sigmoid":
        return torch.sigmoid(_linspace(-6, 6, n)) * (end - start) + start
    return _of_signal({"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": _exponential}[kind], n)


def _linspace(start: float, end: float, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(start, end, n, dtype=dtype, device="cpu")


def _of_signal(signal: Callable[[float], float], n: int, greatest: float = 0.999) -> Tensor:
    """Betas whose products follow a function of time in [0, 1], each capped."""
    betas = [min(1 - signal((i + 1) / n) / signal(i / n), greatest) for i in range(n)]
    return torch.tensor(betas, dtype=torch.float32, device="cpu")


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _exponential(t: float) -> float:
    return math.exp(-12 * t)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    power = zero_terminal(torch.cumprod(1.0 - betas, dim=0).sqrt())
    return 1 - torch.cat([power[:1], power[1:] / power[:-1]])


def zero_terminal(root: Tensor) -> Tensor:
    """alphas_cumprod of their roots. Lin et al. 2023, algorithm 1: shifted to end in 0 and scaled to start where they did."""
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2
