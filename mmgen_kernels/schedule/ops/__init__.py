"""The public functions of the family: what they compute, what they check, their schemas and fakes."""

from mmgen_kernels.schedule.ops.steps import add_noise, guidance, scheduler_step

__all__ = ["add_noise", "guidance", "scheduler_step"]
