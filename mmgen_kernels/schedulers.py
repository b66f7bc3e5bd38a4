"""diffusers' schedulers by their names, with steps in one pass: see docs/schedule.md."""

from mmgen_kernels.schedule.schedulers.base import StepOutput
from mmgen_kernels.schedule.schedulers.classes import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from mmgen_kernels.schedule.schedulers.classes_cogvideox import CogVideoXDDIMScheduler
from mmgen_kernels.schedule.schedulers.classes_flow import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

__all__ = [
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "StepOutput",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
