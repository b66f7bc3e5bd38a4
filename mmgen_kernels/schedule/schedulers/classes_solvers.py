"""Further solvers in lambda = log(alpha / sigma); see classes.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmgen_kernels.schedule.planner import singlestep
from mmgen_kernels.schedule.schedulers.base import Device, Multistep
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
