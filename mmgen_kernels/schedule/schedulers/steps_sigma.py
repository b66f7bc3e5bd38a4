"""`step` of the classes in sigma space but Euler's, as in steps.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_shared import in_sigma_space, of_evaluation, refuse_indices, step_index, with_history


def lms(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, order: int = 4) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    table, row = with_history(stepper, s, k, min(len(s.derivatives), order - 1, k), order - 1, order=int(order))
    prediction, _ = of_channels(table.plan, model_output, sample)
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    named = {"sample": sample, "model_output": prediction, **{f"m{j}": d for j, d in enumerate(reversed(s.derivatives), 1)}}
    found = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs, dtype))
    s.derivatives.append(found["m0"])
    if len(s.derivatives) > order:
        s.derivatives.pop(0)
    s._step_index += 1
    return found["prev_sample"], found["pred_original_sample"]


def heun(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    first = s.dt is None
    table, row = of_evaluation(stepper, s, k, first)
    prediction, _ = of_channels(table.plan, model_output, sample)
    dtype, named = torch.promote_types(sample.dtype, prediction.dtype), {"sample": sample, "model_output": prediction}
    if first:
        found = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs, dtype))
        s.prev_derivative, s.dt, s.sample = found["derivative"], stepper.gap(s, k), sample
    else:
        named |= {"last_sample": s.sample, "derivative": s.prev_derivative}
        found = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs[:2], dtype))
        s.prev_derivative = s.dt = s.sample = None
    s._step_index += 1
    return found["prev_sample"], found["pred_original_sample"]


def kdpm2(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    return two_stage(stepper, s, model_output, timestep, sample, None)


def kdpm2_ancestral(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    return two_stage(stepper, s, model_output, timestep, sample, generator)


def two_stage(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators
) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    first = s.sample is None
    table, row = of_evaluation(stepper, s, k, first)
    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, prediction, generator, prediction.dtype) if table.plan.draws_noise[row] else None
    named = {"sample": sample, "model_output": prediction, "last_sample": s.sample}
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    found = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs, dtype), noise)
    s.sample = sample if first else None
    s._step_index += 1
    return found["prev_sample"], found["pred_original_sample"]


def edm_euler(
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
    *,
    pred_original_sample: Tensor | None = None,
) -> tuple[Tensor, ...]:
    run: dict[str, Any] = {"has_original": pred_original_sample is not None}
    run |= {"s_churn": float(s_churn), "s_tmin": float(s_tmin), "s_tmax": float(s_tmax), "s_noise": float(s_noise)}
    return in_sigma_space(stepper, s, model_output, timestep, sample, generator, run, pred_original_sample)


def consistency_model(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    refuse_indices(s, timestep)
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    table = stepper.table(s)
    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, prediction, generator, prediction.dtype) if table.plan.draws_noise[k] else None
    named = {"sample": sample, "model_output": prediction}
    found = stepper.run(table, k, named, {"prev_sample": torch.promote_types(sample.dtype, prediction.dtype)}, noise)
    s._step_index += 1
    return (found["prev_sample"],)
