"""diffusers' schedulers by their names, with steps in one pass: see docs/schedule.md."""

from mmgen_kernels.schedule.schedulers.base import StepOutput
from mmgen_kernels.schedule.schedulers.classes import (
    DDIMInverseScheduler,
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
from mmgen_kernels.schedule.schedulers.classes_sigma import (
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from mmgen_kernels.schedule.schedulers.classes_solvers import DEISMultistepScheduler, DPMSolverSinglestepScheduler
from mmgen_kernels.schedule.schedulers.discrete import AmusedScheduler, VQDiffusionScheduler

__all__ = [
    "AmusedScheduler",
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "StepOutput",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "VQDiffusionScheduler",
]
