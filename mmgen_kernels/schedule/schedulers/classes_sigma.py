"""Classes in sigma space but Euler's, as in classes.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.schedule import planner
from mmgen_kernels.schedule.planner import consistency, edm, lms
from mmgen_kernels.schedule.schedulers.classes import Device, Euler


class Interpolated(Euler):
    """Of classes whose levels of training are those of a run through all timesteps."""

    def set_training_levels(self) -> None:
        self.alphas_cumprod = planner.betas.alphas_cumprod(self.config, self.schedules)
        self.set_run(None, num_inference_steps=len(self))

    schedules = planner.betas.SCHEDULES


class LMSDiscreteScheduler(Interpolated):
    """A linear multistep method of Adams and Bashforth, as k-diffusion has it: orders 1 to 4."""

    def forget(self) -> None:
        self.derivatives: list[Tensor] = []

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight in step `t` of the derivative of `current_order` steps before."""
        assert self.sigmas is not None
        return lms.coefficient(self.sigmas.tolist(), order, t, current_order)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps."""
        self.set_run(device, num_inference_steps=num_inference_steps)


class Preconditioned(Euler):
    """Of classes whose model is asked for sample / sqrt(sigma^2 + sigma_data^2)."""

    def power_of_data(self) -> float:
        return self.config["sigma_data"] ** 2


class EDMEulerScheduler(Preconditioned):
    """Karras et al. 2022, algorithm 2 without its correction, of models that are preconditioned as theirs."""

    def set_training_levels(self) -> None:
        n = len(self)
        self.set_levels(edm.schedule(self.config, torch.arange(n + 1, dtype=torch.float64) / n))

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, sigmas: Tensor | Sequence[float] | None = None
    ) -> None:
        """The run: so many steps, or `sigmas`, which are places between sigma_max at 0 and sigma_min at 1, as diffusers has it."""
        places = sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas
        self.set_run(device, num_inference_steps=None if places is not None else num_inference_steps, sigmas=places)


class CMStochasticIterativeScheduler(Preconditioned):
    """Song et al. 2023, Consistency Models: one step, or several with noise between them."""

    custom_timesteps = False

    def set_training_levels(self) -> None:
        n = len(self)
        sigmas = [consistency.sigma_at(self.config, place) for place in planner.spacing.linspace(0, 1, n)]
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        self.timesteps = torch.tensor([consistency.time_of(sigma) for sigma in sigmas], dtype=torch.float64)
        self.init_noise_sigma = self.config["sigma_max"]

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """The run: so many steps, or places in the schedule of training, descending."""
        self.custom_timesteps = timesteps is not None
        self.set_run(device, num_inference_steps=num_inference_steps, timesteps=timesteps)
