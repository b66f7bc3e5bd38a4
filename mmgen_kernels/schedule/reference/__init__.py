"""The family in plain PyTorch: the oracle of the tests, the fallback on any device, the baseline of the benchmarks."""

from mmgen_kernels.schedule.reference.discrete import unmask_step, vq_diffusion_step
from mmgen_kernels.schedule.reference.discrete_loss import vq_diffusion_loss, vq_diffusion_loss_backward
from mmgen_kernels.schedule.reference.losses import (
    COLUMNS,
    diffusion_loss,
    diffusion_loss_backward,
    hybrid_loss,
    hybrid_loss_backward,
)
from mmgen_kernels.schedule.reference.steps import (
    FASTEST,
    INPUTS,
    SLOWEST,
    add_noise,
    add_noise_backward,
    computed_in,
    guidance,
    guidance_backward,
    scheduler_step,
    scheduler_step_backward,
)

__all__ = [
    "COLUMNS",
    "FASTEST",
    "INPUTS",
    "SLOWEST",
    "add_noise",
    "add_noise_backward",
    "computed_in",
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
