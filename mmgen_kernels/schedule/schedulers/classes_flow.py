"""The flows' classes; see classes.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.schedule.schedulers import noising
from mmgen_kernels.schedule.schedulers.base import Device, Scheduler


class FlowMatch(Scheduler):
    """What the flows share: their levels, which may be shifted, and (1 - sigma) data + sigma noise."""

    def set_training_levels(self) -> None:
        levels, shift = torch.arange(len(self), 0, -1, dtype=torch.float32) / len(self), self.config["shift"]
        if not self.config.get("use_dynamic_shifting", False):
            levels = shift * levels / (1 + (shift - 1) * levels)
        self.timesteps, self.sigmas = levels * len(self), levels
        self.sigma_max, self.sigma_min = levels[0].item(), levels[-1].item()

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise at the levels of `timestep`, (B,)."""
        return noising.by_flow(self, sample, noise, timestep)


class ShiftedFlowMatch(FlowMatch):
    """Of flows whose levels, and the shift of them, a caller may give."""

    def set_training_levels(self) -> None:
        super().set_training_levels()
        self.set_shift(self.config["shift"])

    @property
    def shift(self) -> float:
        """What the levels of a run are shifted by."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """A shift in place of the config's, from the next set_timesteps on."""
        self._shift = shift

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """The run: so many steps, or levels without the last one, or timesteps; mu is the shift of `use_dynamic_shifting`."""
        run = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps, "shift": self.shift}
        self.set_run(device, num_inference_steps=num_inference_steps, **run)


class FlowMatchEulerDiscreteScheduler(ShiftedFlowMatch):
    """Euler's method for flows: Lipman et al. 2023; Esser et al. 2024 (shifted levels)."""


class FlowMatchLCMScheduler(ShiftedFlowMatch):
    """Consistency sampling of flows: the predicted data, noised to the next level, and resized on the way if one likes."""

    def set_training_levels(self) -> None:
        super().set_training_levels()
        self._init_size: torch.Size | None = None
        self.set_scale_factors(self.config["scale_factors"], self.config["upscale_mode"])

    def set_scale_factors(self, scale_factors: Sequence[float] | None, upscale_mode: str | None) -> None:
        """By what each step's predicted data are resized, relative to the size at the first step; the last step resizes none."""
        self._scale_factors, self._upscale_mode = scale_factors, upscale_mode


class FlowMatchHeunDiscreteScheduler(FlowMatch):
    """Heun's method for flows: pairs of steps, Karras et al. 2022, algorithm 2."""

    order = 2

    def forget(self) -> None:
        self.sample: Tensor | None = None
        self.prev_derivative: Tensor | None = None
        self.dt: float | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of a pair."""
        return self.dt is None

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many pairs of steps, of the last of which there is the first alone."""
        self.set_run(device, num_inference_steps=num_inference_steps)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise at the level of the run's next step, or of `timestep` where none was made."""
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        return noising.by_flow_at(self, sample, noise, self._step_index)
