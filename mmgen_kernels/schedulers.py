"""diffusers' schedulers by their names, with steps in one pass: see docs/schedule.md."""

from collections.abc import Mapping
from typing import Any

from mmgen_kernels.schedule import planner
from mmgen_kernels.schedule.planner import Plan
from mmgen_kernels.schedule.schedulers.base import StepOutput
from mmgen_kernels.schedule.schedulers.classes import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from mmgen_kernels.schedule.schedulers.classes_cogvideox import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from mmgen_kernels.schedule.schedulers.classes_flow import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from mmgen_kernels.schedule.schedulers.classes_sigma import (
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from mmgen_kernels.schedule.schedulers.classes_solvers import (
    DEISMultistepScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
)
from mmgen_kernels.schedule.schedulers.discrete import AmusedScheduler, VQDiffusionScheduler

__all__ = [
    "AmusedScheduler",
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
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
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Plan",
    "SASolverScheduler",
    "StepOutput",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "VQDiffusionScheduler",
    "plan",
]


def plan(class_name: str, config: Mapping[str, Any], **run: Any) -> Plan:
    """A whole run as a table of coefficients, for loops of one's own around `mk.scheduler_step`.

    Args:
        class_name: of one of the schedulers here.
        config: its config; what is missing has diffusers' defaults.
        run: what `set_timesteps`, `set_begin_index` and `step` would be given, as far as coefficients depend on it:
            num_inference_steps, timesteps, sigmas, mu, begin, eta and others, the fields of mmgen_kernels.schedule.planner.Run.

    Returns:
        Plan: rows (steps, 1 + outputs, inputs + 2), names of inputs and outputs, timesteps and where noise is drawn.

    Raises:
        ValueError: for a class, an option or a run that is not planned.
        TypeError: for a name that is no field of a run.
    """
    return planner.plan(class_name, config, planner.Run(**run))
