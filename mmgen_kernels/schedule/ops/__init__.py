"""The public functions of the family: what they compute, what they check, their schemas and fakes."""

from mmgen_kernels.schedule.ops.discrete import UnmaskOutput, unmask_step, vq_diffusion_step
from mmgen_kernels.schedule.ops.discrete_loss import VQDiffusionLoss, vq_diffusion_loss
from mmgen_kernels.schedule.ops.loss_weight import loss_weight
from mmgen_kernels.schedule.ops.losses import HybridLoss, diffusion_loss, hybrid_loss
from mmgen_kernels.schedule.ops.steps import add_noise, guidance, scheduler_step

__all__ = [
    "HybridLoss",
    "UnmaskOutput",
    "VQDiffusionLoss",
    "add_noise",
    "diffusion_loss",
    "guidance",
    "hybrid_loss",
    "loss_weight",
    "scheduler_step",
    "unmask_step",
    "vq_diffusion_loss",
    "vq_diffusion_step",
]
