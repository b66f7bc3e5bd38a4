"""
From a diffusers scheduler's config to a table of coefficients, in fp64, on the host, without diffusers.

A scheduler's step is, but for a clamp, a linear form of a few tensors whose coefficients are known before the first step. All of
them are computed at once: `plan(class_name, config, run)` gives one matrix per step (`Plan.rows`) for one operator to apply.

    Run        what was handed to set_timesteps, set_begin_index and step
    Schedule   timesteps, noise levels, init_noise_sigma
    Plan       rows, what goes in and out, what happens to the predicted x0, where noise is drawn
    DEFAULTS   the constructors' defaults of diffusers 0.42.1

Levels are the numbers that diffusers has, fp32 where it rounds to fp32; what comes of them is fp64. Where Python's floats raise,
coefficients are what IEEE 754 says, as 0-dim tensors are: a schedule with a level twice may have infinite and NaN coefficients.
"""

from __future__ import annotations

from types import ModuleType

from mmgen_kernels.schedule.planner import (
    cogvideox_ddim,
    cogvideox_dpm,
    consistency,
    ddim,
    ddim_inverse,
    ddpm,
    deis,
    dpmsolver,
    edm_dpmsolver,
    edm_euler,
    euler,
    euler_ancestral,
    flow_match,
    flow_match_heun,
    flow_match_lcm,
    heun,
    kdpm2,
    kdpm2_ancestral,
    lcm,
    lms,
    pndm,
    sasolver,
    singlestep,
    tcd,
    unipc,
)
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.defaults import DEFAULTS

__all__ = ["DEFAULTS", "Plan", "Run", "Schedule", "complete", "plan", "schedule"]

CLASSES: dict[str, ModuleType] = {
    "DDPMScheduler": ddpm,
    "DDIMScheduler": ddim,
    "EulerDiscreteScheduler": euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "DPMSolverMultistepScheduler": dpmsolver,
    "UniPCMultistepScheduler": unipc,
    "CogVideoXDDIMScheduler": cogvideox_ddim,
    "FlowMatchEulerDiscreteScheduler": flow_match,
    "CogVideoXDPMScheduler": cogvideox_dpm,
    "DEISMultistepScheduler": deis,
    "DPMSolverSinglestepScheduler": singlestep,
    "SASolverScheduler": sasolver,
    "FlowMatchHeunDiscreteScheduler": flow_match_heun,
    "FlowMatchLCMScheduler": flow_match_lcm,
    "TCDScheduler": tcd,
    "LCMScheduler": lcm,
    "DDIMInverseScheduler": ddim_inverse,
    "PNDMScheduler": pndm,
    "LMSDiscreteScheduler": lms,
    "HeunDiscreteScheduler": heun,
    "KDPM2DiscreteScheduler": kdpm2,
    "KDPM2AncestralDiscreteScheduler": kdpm2_ancestral,
    "EDMEulerScheduler": edm_euler,
    "EDMDPMSolverMultistepScheduler": edm_dpmsolver,
    "CMStochasticIterativeScheduler": consistency,
}


def complete(class_name: str, config: Config) -> dict[str, object]:
    """
    The config with the constructor's defaults for what it does not list. What the class does not take (`_class_name`, the settings
    of another scheduler that a file keeps for a round trip) is dropped, as diffusers' `from_config` drops it.

    Raises:
        ValueError: for a class that is not planned.
    """
    _module(class_name)
    defaults = DEFAULTS[class_name]
    return defaults | {name: config[name] for name in defaults if name in config}


def schedule(class_name: str, config: Config, run: Run) -> Schedule:
    """
    Timesteps, noise levels and init_noise_sigma of a run.

    Raises:
        ValueError: for a class that is not planned, an option that it does not know or a run that it does not take.
    """
    module = _module(class_name)
    _check(class_name, module, run)
    made: Schedule = module.schedule(complete(class_name, config), run)
    return made


def plan(class_name: str, config: Config, run: Run, *, levels: Schedule | None = None) -> Plan:
    """
    The table of a run.

    Args:
        class_name: a class of diffusers: a key of `DEFAULTS`.
        config: its config; what is missing is filled in by `complete`.
        run: what the run's methods are handed.
        levels: timesteps and levels to plan for, where the caller has them already; without, those of `schedule`.

    Raises:
        ValueError: naming the option that cannot be planned.
    """
    module = _module(class_name)
    _check(class_name, module, run)
    config = complete(class_name, config)
    if levels is None:
        levels = module.schedule(config, run)
    if not 0 <= run.begin < len(levels.timesteps):
        raise ValueError(f"begin must be a step of the run's {len(levels.timesteps)}, got {run.begin}")
    table: Plan = module.plan(config, run, levels)
    return table


def _module(class_name: str) -> ModuleType:
    if class_name not in CLASSES:
        raise ValueError(f"class_name must be one of {', '.join(CLASSES)}, got {class_name!r}")
    return CLASSES[class_name]


def _check(class_name: str, module: ModuleType, run: Run) -> None:
    default = Run()
    for name in Run.__dataclass_fields__:
        value, usual = getattr(run, name), getattr(default, name)
        if name not in module.TAKES and (value is not None if usual is None else value != usual):
            raise ValueError(f"{name} is not taken by {class_name}, got {value!r}")
    if run.num_inference_steps is not None and run.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {run.num_inference_steps}")
