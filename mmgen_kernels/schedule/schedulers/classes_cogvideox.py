"""The CogVideoX classes; see classes.py."""

from __future__ import annotations

from torch import Tensor

from mmgen_kernels.schedule.planner import cogvideox
from mmgen_kernels.schedule.schedulers.base import Device, VariancePreserving


class CogVideoX(VariancePreserving):
    """What the two share: levels whose signal to noise ratio is divided by `snr_shift_scale`."""

    def levels_of_training(self) -> Tensor:
        return cogvideox.alphas_cumprod(self.config)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps."""
        self.set_run(device, num_inference_steps=num_inference_steps)


class CogVideoXDDIMScheduler(CogVideoX):
    """Yang et al. 2024, CogVideoX: DDIM without noise."""


class CogVideoXDPMScheduler(CogVideoX):
    """Yang et al. 2024, CogVideoX: DPM-Solver++ with noise; `step` is handed the data predicted a step ago, and when that was."""
