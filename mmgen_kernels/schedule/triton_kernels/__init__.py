"""Triton kernels of the family and their launchers, imported at the first call. The derivatives of steps are the reference's."""

from mmgen_kernels.schedule.reference import add_noise_backward, guidance_backward, scheduler_step_backward
from mmgen_kernels.schedule.triton_kernels.add_noise import add_noise
from mmgen_kernels.schedule.triton_kernels.diffusion_loss import diffusion_loss, diffusion_loss_backward
from mmgen_kernels.schedule.triton_kernels.discrete import unmask_step, vq_diffusion_step
from mmgen_kernels.schedule.triton_kernels.discrete_loss import vq_diffusion_loss, vq_diffusion_loss_backward
from mmgen_kernels.schedule.triton_kernels.hybrid_loss import hybrid_loss, hybrid_loss_backward
from mmgen_kernels.schedule.triton_kernels.scheduler_step import guidance, scheduler_step

__all__ = [
    "add_noise",
    "add_noise_backward",
    "diffusion_loss",
    "diffusion_loss_backward",
    "guidance",
    "guidance_backward",
    "hybrid_loss",
    "hybrid_loss_backward",
    "scheduler_step",
    "scheduler_step_backward",
    "unmask_step",
    "vq_diffusion_loss",
    "vq_diffusion_loss_backward",
    "vq_diffusion_step",
]
