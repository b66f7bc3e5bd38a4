"""Further solvers in lambda = log(alpha / sigma); see classes.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmgen_kernels.schedule.planner import sasolver, singlestep
from mmgen_kernels.schedule.schedulers import noising
from mmgen_kernels.schedule.schedulers.base import Device, Multistep, SigmaSpace
from mmgen_kernels.schedule.schedulers.configuration import Config


class DEISMultistepScheduler(Multistep):
    """Zhang and Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator, in log rho, orders 1 to 3."""

    def set_timesteps(self, num_inference_steps: int, device: Device = None, mu: float | None = None) -> None:
        """The run: so many steps; mu is the logarithm of the shift of flow levels."""
        self.set_run(device, num_inference_steps=num_inference_steps, mu=mu)


class DPMSolverSinglestepScheduler(Multistep):
    """Lu et al. 2022, DPM-Solver and DPM-Solver++, in groups of one, two or three steps."""

    def forget(self) -> None:
        self.model_outputs: list[Tensor | None] = [None] * self.config["solver_order"]
        self.sample: Tensor | None = None
        steps = len(self.timesteps)
        if self.num_inference_steps is not None and not singlestep.whole_groups(self.config, steps):
            self.config = Config({**self.config, "lower_order_final": True})  # for good, as diffusers has it
        self.order_list = singlestep.order_list(self.config, steps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """The run: so many steps, or the timesteps themselves; mu is the logarithm of the shift of flow levels."""
        self.set_run(device, num_inference_steps=num_inference_steps, mu=mu, timesteps=timesteps)


class SASolverScheduler(SigmaSpace):
    """Xue et al. 2023, SA-Solver: stochastic Adams methods, a predictor and a corrector."""

    def set_training_levels(self) -> None:
        super().set_training_levels()
        self.tau_func = self.config["tau_func"] or sasolver.between
        self.predict_x0 = self.config["algorithm_type"] == "data_prediction"

    def forget(self) -> None:
        full = sasolver.history(self.config)
        self.model_outputs: list[Tensor | None] = [None] * full
        self.timestep_list: list[Any] = [None] * full
        self.lower_order_nums = 0
        self.last_sample: Tensor | None = None
        self.last_noise: Tensor | None = None
        self.this_predictor_order = self.this_corrector_order = 0

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps."""
        self.set_run(device, num_inference_steps=num_inference_steps)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) original_samples + sqrt(1 - a) noise with a = alphas_cumprod[timesteps], (B,)."""
        return noising.by_alphas(self, original_samples, noise, timesteps)
