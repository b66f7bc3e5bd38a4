"""`step` of each class, with diffusers' arguments, its dtypes and its use of generators; what it returns as a tuple.

Every function takes the stepper and the scheduler, and reads and writes step index and history where the scheduler has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Table, Unplanned, check_tensors, of_channels

FP32 = torch.float32


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


def lcm(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    if stepper.place(s, timestep) != k:
        raise Unplanned(f"timestep must be that of step {k}, got {timestep}")
    table = stepper.table(s)
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
    refuse_indices(s, timestep)
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    table = stepper.table(s, s_churn=float(s_churn), s_tmin=float(s_tmin), s_tmax=float(s_tmax), s_noise=float(s_noise))
    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, prediction, generator, prediction.dtype) if table.plan.draws_noise[k] else None
    results = in_sigma_space(stepper, table, k, prediction, sample, noise)
    s._step_index += 1
    return results


def euler_ancestral(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    refuse_indices(s, timestep)
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    table = stepper.table(s)
    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, prediction, generator, prediction.dtype)
    results = in_sigma_space(stepper, table, k, prediction, sample, noise)
    s._step_index += 1
    return results


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
    named = {"sample": sample, "model_output": prediction}
    found = stepper.run(table, k, named, {"prev_sample": prediction.dtype}, noise)
    s._step_index += 1
    return (found["prev_sample"],)


def dpm_solver(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    require_timesteps(s)
    k = step_index(s, timestep)
    table, row = with_history(stepper, s, k)
    prediction, _ = of_channels(table.plan, model_output, sample)
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    named = {"sample": sample, "model_output": prediction, **history_of(s)}
    table.require(row, named)  # before a generator is used
    noise = None
    if table.plan.draws_noise[row]:
        noise = stepper.draw(table, prediction, generator, FP32) if variance_noise is None else variance_noise
    found = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs, dtype), noise)
    remember(s, found["m0"])
    s._step_index += 1
    return (found["prev_sample"],)


def unipc(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    require_timesteps(s)
    k = step_index(s, timestep)
    table, row = with_history(stepper, s, k)
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
    "LCMScheduler": (lcm, ("prev_sample", "denoised")),
}

# -- what they share --------------------------------------------------------------------------------------------------


def by_timestep(stepper: Stepper, s: Any, timestep: Any, **run: Any) -> tuple[Table, int]:
    """Of a scheduler that counts no steps: the row of the timestep, or a table of that timestep alone."""
    k = stepper.place(s, timestep)
    if 0 <= k < len(s.timesteps):
        return stepper.table(s, **run), k
    if stepper.class_name != "DDIMScheduler" or not 0 <= int(timestep) < s.config["num_train_timesteps"]:
        raise Unplanned(f"timestep must be one of the run's, got {timestep}")
    return stepper.table(s, alone=int(timestep), **run), 0


def require_timesteps(s: Any) -> None:
    if s.num_inference_steps is None:
        raise ValueError("num_inference_steps is None: call set_timesteps before step")


def step_index(s: Any, timestep: Any) -> int:
    if s.step_index is None:
        s._init_step_index(timestep)
    if not 0 <= s._step_index < len(s.timesteps):
        raise Unplanned(f"step must be one of the run's {len(s.timesteps)}, got number {s._step_index}")
    return s._step_index


def refuse_indices(s: Any, timestep: Any) -> None:
    if isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64)):
        raise ValueError(f"timestep must be one of scheduler.timesteps, not an index, got {timestep!r}")


def first_two(
    stepper: Stepper, table: Table, k: int, prediction: Tensor, sample: Tensor, noise: Tensor | None, variance: Tensor | None = None
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    named = {"sample": sample, "model_output": prediction}
    return tuple(stepper.run(table, k, named, dict.fromkeys(table.plan.outputs, dtype), noise, variance).values())


def in_sigma_space(
    stepper: Stepper, table: Table, k: int, prediction: Tensor, sample: Tensor, noise: Tensor | None
) -> tuple[Tensor, ...]:
    """The sample in the model output's dtype, the data in fp32 at least."""
    named = {"sample": sample, "model_output": prediction}
    wide = torch.promote_types(FP32, prediction.dtype)
    found = stepper.run(table, k, named, {"prev_sample": prediction.dtype, "pred_original_sample": wide}, noise)
    return found["prev_sample"], found["pred_original_sample"]


def with_history(stepper: Stepper, s: Any, k: int) -> tuple[Table, int]:
    """The plan of a run that began where the scheduler's history does, and its row of step k."""
    begin = k - s.lower_order_nums if s.lower_order_nums < s.config["solver_order"] else stepper_begin(stepper, s, k)
    if begin < 0:
        raise Unplanned(f"step {k} must have at most {k} steps before it, got a history of {s.lower_order_nums}")
    return stepper.table(s, begin=begin), k - begin


def stepper_begin(stepper: Stepper, s: Any, k: int) -> int:
    """Of a full history any beginning that far back will do: the plan that is there already."""
    stepper.table(s)  # drops what was planned for other timesteps
    known = [asked[0] for asked in stepper.tables if asked[0] <= k - s.config["solver_order"]]
    return max(known, default=max(k - s.config["solver_order"], 0))


def history_of(s: Any) -> dict[str, Tensor | None]:
    return {f"m{j}": m for j, m in enumerate(reversed(s.model_outputs), 1)}


def remember(s: Any, m0: Tensor) -> None:
    s.model_outputs = [*s.model_outputs[1:], m0]
    s.lower_order_nums = min(s.lower_order_nums + 1, s.config["solver_order"])
