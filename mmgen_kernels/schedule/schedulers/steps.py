"""`step` of each class, with diffusers' arguments, its dtypes and its use of generators; what it returns as a tuple.

Every function takes the stepper and the scheduler, and reads and writes step index and history where the scheduler has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Unplanned, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_cogvideox import cogvideox_ddim, cogvideox_dpm
from mmgen_kernels.schedule.schedulers.steps_flow import flow_match_heun, flow_match_lcm
from mmgen_kernels.schedule.schedulers.steps_pndm import plms, pndm, prk
from mmgen_kernels.schedule.schedulers.steps_shared import (
    FP32,
    by_timestep,
    first_two,
    history_of,
    in_sigma_space,
    multistep,
    refuse_indices,
    remember,
    require_timestep_of,
    require_timesteps,
    step_index,
    with_history,
)
from mmgen_kernels.schedule.schedulers.steps_sigma import consistency_model, edm_euler, heun, kdpm2, kdpm2_ancestral, lms
from mmgen_kernels.schedule.schedulers.steps_solvers import deis, sasolver, singlestep


def ddpm(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    table, k = by_timestep(stepper, s, timestep)
    prediction, variance = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, prediction, generator, prediction.dtype) if table.plan.draws_noise[k] else None
    return first_two(stepper, table, k, prediction, sample, noise, variance)


def ddim(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    if eta > 0 and variance_noise is not None and generator is not None:
        raise ValueError("generator and variance_noise are alternatives, got both")
    table, k = by_timestep(stepper, s, timestep, eta=float(eta), use_clipped_model_output=bool(use_clipped_model_output))
    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = None
    if eta > 0:
        noise = stepper.draw(table, prediction, generator, prediction.dtype) if variance_noise is None else variance_noise
    return first_two(stepper, table, k, prediction, sample, noise)


def ddim_inverse(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    table, k = by_timestep(stepper, s, timestep)
    prediction, _ = of_channels(table.plan, model_output, sample)
    return first_two(stepper, table, k, prediction, sample, None)


def lcm(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    return consistency(stepper, s, model_output, timestep, sample, generator)


def tcd(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.3, generator: Generators = None
) -> tuple[Tensor, ...]:
    return consistency(stepper, s, model_output, timestep, sample, generator, eta=float(eta))


def consistency(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators, **run: Any
) -> tuple[Tensor, ...]:
    """A step of a class by timesteps that counts them."""
    check_tensors(model_output, sample)
    require_timesteps(s)
    k = step_index(s, timestep)
    require_timestep_of(stepper, s, k, timestep)
    table = stepper.table(s, **run)
    prediction, _ = of_channels(table.plan, model_output, sample)
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    noise = stepper.draw(table, prediction, generator, dtype) if table.plan.draws_noise[k] else None
    results = first_two(stepper, table, k, prediction, sample, noise)
    s._step_index += 1
    return results


def euler(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, ...]:
    run = {"s_churn": float(s_churn), "s_tmin": float(s_tmin), "s_tmax": float(s_tmax), "s_noise": float(s_noise)}
    return in_sigma_space(stepper, s, model_output, timestep, sample, generator, run)


def euler_ancestral(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    return in_sigma_space(stepper, s, model_output, timestep, sample, generator, {})


def flow_match_euler(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: Generators = None,
    per_token_timesteps: Tensor | None = None,
) -> tuple[Tensor, ...]:
    refuse_indices(s, timestep)
    check_tensors(model_output, sample)
    if per_token_timesteps is not None:
        raise Unplanned("per_token_timesteps must be None: one level for each token is no row of a table")
    k = step_index(s, timestep)
    table = stepper.table(s)
    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, sample, generator, FP32) if table.plan.draws_noise[k] else None
    results = stepper.run_pair(table, k, sample, prediction, (prediction.dtype,), noise)
    s._step_index = k + 1
    return results


def dpm_solver(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return multistep(stepper, s, model_output, timestep, sample, generator, variance_noise, FP32)


def edm_dpm_solver(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    return multistep(stepper, s, model_output, timestep, sample, generator)


def unipc(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    require_timesteps(s)
    k = step_index(s, timestep)
    table, row = with_history(stepper, s, k, s.lower_order_nums, s.config["solver_order"])
    prediction, _ = of_channels(table.plan, model_output, sample)
    dtypes = dict.fromkeys(table.plan.outputs, sample.dtype) | {"m0": torch.promote_types(sample.dtype, prediction.dtype)}
    named = {"sample": sample, "model_output": prediction, "last_sample": s.last_sample, **history_of(s)}
    table.require(row, named)
    found = stepper.run(table, row, named, dtypes)
    left = len(s.timesteps) - k if s.config["lower_order_final"] else s.config["solver_order"]
    s.this_order = min(s.config["solver_order"], left, s.lower_order_nums + 1)
    s.timestep_list = [*s.timestep_list[1:], timestep]
    s.last_sample = found["corrected"]
    remember(s, found["m0"])
    s._step_index += 1
    return (found["prev_sample"],)


# class -> its step, and the fields of what it returns
STEPS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[str, ...]]] = {
    "DDPMScheduler": (ddpm, ("prev_sample", "pred_original_sample")),
    "DDIMScheduler": (ddim, ("prev_sample", "pred_original_sample")),
    "EulerDiscreteScheduler": (euler, ("prev_sample", "pred_original_sample")),
    "EulerAncestralDiscreteScheduler": (euler_ancestral, ("prev_sample", "pred_original_sample")),
    "DPMSolverMultistepScheduler": (dpm_solver, ("prev_sample",)),
    "UniPCMultistepScheduler": (unipc, ("prev_sample",)),
    "FlowMatchEulerDiscreteScheduler": (flow_match_euler, ("prev_sample",)),
    "DEISMultistepScheduler": (deis, ("prev_sample",)),
    "DPMSolverSinglestepScheduler": (singlestep, ("prev_sample",)),
    "CogVideoXDPMScheduler": (cogvideox_dpm, ("prev_sample", "pred_original_sample")),
    "SASolverScheduler": (sasolver, ("prev_sample",)),
    "FlowMatchHeunDiscreteScheduler": (flow_match_heun, ("prev_sample",)),
    "FlowMatchLCMScheduler": (flow_match_lcm, ("prev_sample",)),
    "LCMScheduler": (lcm, ("prev_sample", "denoised")),
    "TCDScheduler": (tcd, ("prev_sample", "pred_noised_sample")),
    "CogVideoXDDIMScheduler": (cogvideox_ddim, ("prev_sample", "pred_original_sample")),
    "DDIMInverseScheduler": (ddim_inverse, ("prev_sample", "pred_original_sample")),
    "PNDMScheduler": (pndm, ("prev_sample",)),
    "LMSDiscreteScheduler": (lms, ("prev_sample", "pred_original_sample")),
    "HeunDiscreteScheduler": (heun, ("prev_sample", "pred_original_sample")),
    "KDPM2DiscreteScheduler": (kdpm2, ("prev_sample", "pred_original_sample")),
    "KDPM2AncestralDiscreteScheduler": (kdpm2_ancestral, ("prev_sample", "pred_original_sample")),
    "EDMDPMSolverMultistepScheduler": (edm_dpm_solver, ("prev_sample",)),
    "EDMEulerScheduler": (edm_euler, ("prev_sample", "pred_original_sample")),
    "CMStochasticIterativeScheduler": (consistency_model, ("prev_sample",)),
}
TUPLES = ("CogVideoXDPMScheduler",)  # return one where return_dict is not given

# class -> further methods that step, which return what `step` does
ALSO_STEP: dict[str, dict[str, Callable[..., tuple[Tensor, ...]]]] = {"PNDMScheduler": {"step_prk": prk, "step_plms": plms}}
