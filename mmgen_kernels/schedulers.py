"""diffusers' schedulers by their names, with steps in one pass: see docs/schedule.md."""

from mmgen_kernels.schedule.schedulers.base import StepOutput
from mmgen_kernels.schedule.schedulers.classes import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "StepOutput",
    "UniPCMultistepScheduler",
]
