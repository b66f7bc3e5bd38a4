"""The classes: what each has of its own. Constructors, steps and configs are those of `Scheduler`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmgen_kernels.schedule.planner import ddpm, pndm
from mmgen_kernels.schedule.planner.sigmas import start
from mmgen_kernels.schedule.schedulers import noising
from mmgen_kernels.schedule.schedulers.base import Device, Diffusion, Multistep, SigmaSpace, VariancePreserving


class DDPMScheduler(VariancePreserving):
    """Ho et al. 2020, Denoising Diffusion Probabilistic Models; Nichol and Dhariwal 2021 (learned range)."""

    schedules = ddpm.BETA_SCHEDULES

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """The run: so many steps, or the timesteps themselves, descending."""
        self.set_run(device, num_inference_steps=num_inference_steps, timesteps=timesteps)

    def previous_timestep(self, timestep: int) -> int:
        """The timestep that follows in sampling, -1 after the last one."""
        place = self.stepper.place(self, timestep)
        return int(self.timesteps[place + 1]) if place + 1 < len(self.timesteps) else -1


class DDIMScheduler(VariancePreserving):
    """Song et al. 2021, Denoising Diffusion Implicit Models."""

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps."""
        self.set_run(device, num_inference_steps=num_inference_steps)


class PNDMScheduler(VariancePreserving):
    """Liu et al. 2022, Pseudo Numerical Methods for Diffusion Models: Runge and Kutta's first steps, then Adams and Bashforth's."""

    pndm_order = 4
    scale_model_input = Diffusion.scale_model_input

    def forget(self) -> None:
        self.counter = 0
        self.ets: list[Tensor] = []
        self.cur_sample: Tensor | None = None
        self.cur_model_output: Tensor | int = 0
        self.prk_timesteps: list[int] = []
        self.plms_timesteps: list[int] = []

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps. It has an evaluation more where the first steps are Adams and Bashforth's too, else nine."""
        self.set_run(device, num_inference_steps=num_inference_steps)
        self.prk_timesteps, self.plms_timesteps = pndm.timesteps_of(self.config, num_inference_steps)


class DDIMInverseScheduler(VariancePreserving):
    """DDIM's steps from data to noise: Song et al. 2021, section 4.3."""

    def set_training_levels(self) -> None:
        super().set_training_levels()
        self.timesteps = self.timesteps.flip(0)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps, upwards."""
        self.set_run(device, num_inference_steps=num_inference_steps)


class Consistency(VariancePreserving):
    """What the two consistency samplers share: a run is picked from the steps of the distillation."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """The run: so many of the distillation's steps, or the timesteps themselves, descending."""
        run = {"original_inference_steps": original_inference_steps, "timesteps": timesteps, "strength": strength}
        self.set_run(device, num_inference_steps=num_inference_steps, **run)


class LCMScheduler(Consistency):
    """Luo et al. 2023, Latent Consistency Models."""


class TCDScheduler(Consistency):
    """Zheng et al. 2024, Trajectory Consistency Distillation."""


class Euler(SigmaSpace):
    """What Euler's classes and their kin share: samples x0 + sigma noise, which the model sees scaled."""

    is_scale_input_called = False

    def set_training_levels(self) -> None:
        super().set_training_levels()
        assert self.sigmas is not None
        self.init_noise_sigma = start(self.config, self.sigmas.tolist())

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """sample / sqrt(sigma^2 + 1); sigma_data^2 for the 1 where the class has one."""
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        self.is_scale_input_called = True
        return sample / math.sqrt(self.level(self._step_index) ** 2 + self.power_of_data())

    def level(self, k: int) -> float:
        """The model's at step k."""
        assert self.sigmas is not None
        return float(self.sigmas[k])

    def power_of_data(self) -> float:
        return 1.0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """original_samples + sigma noise at the levels of `timesteps`, (B,)."""
        return noising.by_sigma(self, original_samples, noise, timesteps)


class EulerDiscreteScheduler(Euler):
    """Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, algorithm 2 without its correction."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """The run: so many steps, or timesteps, or levels, the last one included."""
        self.set_run(device, num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) noise - sqrt(1 - a) sample with a = alphas_cumprod at the whole `timesteps`, (B,)."""
        return noising.velocity(self, sample, noise, timesteps)


class EulerAncestralDiscreteScheduler(Euler):
    """Euler's step to a lower level and noise back up to the next one, as k-diffusion has it."""

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps."""
        self.set_run(device, num_inference_steps=num_inference_steps)


class DPMSolverMultistepScheduler(Multistep):
    """Lu et al. 2022, DPM-Solver and DPM-Solver++, multistep, orders 1 to 3, and their stochastic forms."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """The run: so many steps, or the timesteps themselves; mu is the logarithm of the shift of flow levels."""
        self.set_run(device, num_inference_steps=num_inference_steps, mu=mu, timesteps=timesteps)


class UniPCMultistepScheduler(Multistep):
    """Zhao et al. 2023, UniPC: a predictor and a corrector of one order, here in one pass."""

    @property
    def disable_corrector(self) -> Sequence[int]:
        return self.config["disable_corrector"]

    def forget(self) -> None:
        super().forget()
        self.timestep_list: list[Any] = [None] * self.config["solver_order"]
        self.last_sample: Tensor | None = None
        self.this_order = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """The run: so many steps, or the levels of a flow; mu is the shift of `use_dynamic_shifting`."""
        self.set_run(device, num_inference_steps=num_inference_steps if sigmas is None else None, sigmas=sigmas, mu=mu)
