"""What a diffusion model is trained to predict, of which noise: the objectives of DDPM and of rectified flow.

    flow                  x_t = (1 - t) x0 + t z, target z - x0                        Liu et al. 2022, Lipman et al. 2022
    epsilon, v, sample    x_t = sqrt(a) x0 + sqrt(1 - a) z, a = alphas_cumprod[t]      Ho et al. 2020, Salimans and Ho 2022

Models are told times as 0 ... num_train_timesteps from data to noise, so that diffusers' schedulers serve them as they are.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk

TARGETS = {"flow": None, "epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}  # and diffusers' prediction_type
TIMES = ("uniform", "logit_normal")
NOISE, TIME = 0, 1  # streams of a step's key
Model = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ObjectiveConfig:
    target: str = "flow"
    times: str = "logit_normal"  # more of the middle, where a flow is hardest (Esser et al. 2024); uniform: each as often
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"  # and below: of DDPM's objectives
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        for name, known in (("target", TARGETS), ("times", TIMES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {self.num_train_timesteps}")
        if self.target != "flow" and self.times != "uniform":
            raise ValueError(f"times must be 'uniform' with target {self.target!r}, got {self.times!r}")

    @property
    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """Class and config of the diffusers scheduler that samples by Euler's method or DDIM what was trained so."""
        if self.target == "flow":
            return "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": self.num_train_timesteps}
        return "DDIMScheduler", self.betas | {"prediction_type": TARGETS[self.target], "clip_sample": False}

    def scheduler_named(self, name: str, *, learn_sigma: bool = False) -> Any:
        """The scheduler of `mk.schedulers` with that name, set to sample what was trained so; of a model that says a variance
        besides, DDPM reads it."""
        others = ("DDIMInverseScheduler", "CogVideoXDPMScheduler")  # leads to noise; steps with the data of the step before
        known = [n for n in mk.schedulers.__all__ if n.endswith("Scheduler") and n not in others]
        if name not in known:
            raise ValueError(f"--scheduler must be one of {', '.join(known)}, got {name!r}")
        scheduler = getattr(mk.schedulers, name)
        options = inspect.signature(scheduler).parameters
        given: dict[str, Any] = {"num_train_timesteps": self.num_train_timesteps}
        if self.target != "flow":
            given = self.betas | {"prediction_type": TARGETS[self.target], "clip_sample": False}
            given |= {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": False}  # the levels of training, as they are
            if learn_sigma and name == "DDPMScheduler":
                given["variance_type"] = "learned_range"
        elif "use_flow_sigmas" in options:
            given |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        fits = name.startswith("FlowMatch") or "use_flow_sigmas" in options if self.target == "flow" else "beta_schedule" in options
        if not fits:
            raise ValueError(f"--scheduler must sample models with target {self.target!r}, got {name!r}")
        return scheduler.from_config({n: v for n, v in given.items() if n in options})

    @property
    def betas(self) -> dict[str, Any]:
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        return {name: getattr(self, name) for name in names}


class Objective:
    """The loss of a batch as a function of its key: the same key gives the same times and the same noise."""

    def __init__(self, config: ObjectiveConfig, device: torch.device):
        self.config = config
        self.table: Tensor | None = None  # alphas_cumprod, (S,)
        if config.target != "flow":
            a = mk.schedulers.DDPMScheduler(**config.betas).alphas_cumprod.double()  # type: ignore[union-attr]
            betas = 1 - a / torch.cat((a.new_ones(1), a[:-1]))
            self.table, self.bound = a.to(device), mk.hybrid_table(betas, prediction=config.target).to(device)

    def times(self, batch_size: int, key: Tensor) -> Tensor:
        """(B,): numbers between 0 and 1 of a flow, else indices into the table."""
        if self.config.times == "logit_normal":
            return mk.philox_normal((batch_size,), key).sigmoid()
        uniform = mk.philox_uniform((batch_size,), key)
        return uniform if self.table is None else (uniform * len(self.table)).long()

    def noised(self, x0: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t and the target, of x0's shape, and the timesteps (B,) that the model is told."""
        t, noise = self.times(len(x0), mk.fold_in(key, TIME)), mk.fold_in(key, NOISE)
        path = "linear" if self.table is None else "vp"
        x_t, target = mk.add_noise(x0, noise, t, path=path, target=self.config.target, table=self.table)
        return x_t, target, t * self.config.num_train_timesteps if self.table is None else t

    def loss(self, model: Model, x0: Tensor, labels: Tensor, key: Tensor) -> Tensor:
        """Mean square of ``model(x_t, t, labels) - target``, (). Where a model of DDPM's targets has twice the channels, the bound
        of the variance that the second half says is added (Nichol and Dhariwal 2021); of a flow the first half is trained."""
        x_t, target, timesteps = self.noised(x0, key)
        output = model(x_t, timesteps, labels)  # (B, C or 2 C, ...)
        if self.table is None or output.shape[1] == x0.shape[1]:
            return F.mse_loss(output[:, : x0.shape[1]], target)
        noise = target if self.config.target == "epsilon" else mk.philox_normal(x0.shape, mk.fold_in(key, NOISE))
        return mk.hybrid_loss(output, x0, noise, timesteps, table=self.bound).loss.mean()
