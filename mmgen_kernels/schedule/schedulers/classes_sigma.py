"""Classes in sigma space but Euler's, as in classes.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmgen_kernels.schedule import planner
from mmgen_kernels.schedule.planner import consistency, edm, heun, kdpm2, lms
from mmgen_kernels.schedule.schedulers.base import Multistep
from mmgen_kernels.schedule.schedulers.classes import Device, Euler


class Interpolated(Euler):
    """Of classes whose levels of training are those of a run through all timesteps."""

    schedules: Sequence[str] = planner.betas.SCHEDULES

    def set_training_levels(self) -> None:
        self.alphas_cumprod = planner.betas.alphas_cumprod(self.config, tuple(self.schedules))
        self.set_run(None, num_inference_steps=len(self))


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


class HeunDiscreteScheduler(Interpolated):
    """Karras et al. 2022, algorithm 2 without its noise: two evaluations of the model for a step, but for the last."""

    order = 2
    schedules = heun.BETA_SCHEDULES

    def forget(self) -> None:
        self.prev_derivative: Tensor | None = None
        self.dt: Tensor | None = None
        self.sample: Tensor | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next evaluation begins a step."""
        return self.dt is None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """The run: so many steps, spaced as among `num_train_timesteps` where that is given, or the timesteps themselves."""
        self.set_run(device, num_inference_steps=num_inference_steps, num_train_timesteps=num_train_timesteps, timesteps=timesteps)


class KDPM2(Interpolated):
    """What the two KDPM2 share: a step's second evaluation is at a level between the two that the step joins."""

    order = 2

    def forget(self) -> None:
        self.sample: Tensor | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next evaluation begins a step."""
        return self.sample is None

    def set_timesteps(self, num_inference_steps: int, device: Device = None, num_train_timesteps: int | None = None) -> None:
        """The run: so many steps, spaced as among `num_train_timesteps` where that is given."""
        self.set_run(device, num_inference_steps=num_inference_steps, num_train_timesteps=num_train_timesteps)

    def level(self, k: int) -> float:
        """The model's at evaluation k."""
        return super().level(k) if self.state_in_first_order else self.between(k)

    def between(self, k: int) -> float:
        raise NotImplementedError


class KDPM2DiscreteScheduler(KDPM2):
    """DPM-Solver-2 as k-diffusion has it: Lu et al. 2022, on the levels of Karras et al. 2022."""

    def between(self, k: int) -> float:
        assert self.sigmas is not None
        return kdpm2.halfway(self.sigmas.tolist(), k)


class KDPM2AncestralDiscreteScheduler(KDPM2):
    """KDPM2's step to a lower level and noise back up to the next one, as k-diffusion has it."""

    def between(self, k: int) -> float:
        assert self.sigmas is not None
        return float(self.sigmas[2 * (k // 2) + 2])


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


class EDMDPMSolverMultistepScheduler(Preconditioned, Multistep):
    """DPM-Solver++ (Lu et al. 2022), multistep, of models that are preconditioned as in Karras et al. 2022."""

    def set_training_levels(self) -> None:
        levels = edm.schedule(self.config, torch.linspace(0, 1, len(self), dtype=torch.float32))
        self.set_levels(replace(levels, sigmas=(*(levels.sigmas or ())[:-1], 0.0)))

    def set_timesteps(self, num_inference_steps: int | None = None, device: Device = None) -> None:
        """The run: so many steps."""
        self.set_run(device, num_inference_steps=num_inference_steps)


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
