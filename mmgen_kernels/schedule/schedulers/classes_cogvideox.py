"""The CogVideoX classes; see classes.py."""

from __future__ import annotations

from torch import Tensor

from mmgen_kernels.schedule.planner import cogvideox
from mmgen_kernels.schedule.schedulers.base import Device, VariancePreserving


class CogVideoXDDIMScheduler(VariancePreserving):
    """Yang et al. 2024, CogVideoX: DDIM without noise, of levels whose signal to noise ratio is divided by `snr_shift_scale`."""

    def levels_of_training(self) -> Tensor:
        return cogvideox.alphas_cumprod(self.config)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """The run: so many steps."""
        self.set_run(device, num_inference_steps=num_inference_steps)
