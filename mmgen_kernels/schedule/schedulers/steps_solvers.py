"""`step` of further solvers with history; see steps.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_shared import history_of, multistep, require_timesteps, step_index, with_history


def deis(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    return multistep(stepper, s, model_output, timestep, sample)


def singlestep(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    require_timesteps(s)
    k, kept = step_index(s, timestep), sum(m is not None for m in s.model_outputs)
    table, row = with_history(stepper, s, k, kept, s.config["solver_order"])
    prediction, _ = of_channels(table.plan, model_output, sample)
    named = {"sample": sample, "model_output": prediction, "x1": s.sample, "x2": s.sample, **history_of(s)}
    table.require(row, named)  # before a generator is used
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    noise = stepper.draw(table, prediction, generator, dtype) if table.plan.draws_noise[row] else None
    found = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs, dtype), noise)
    if min(s.order_list[k], kept + 1) == 1:  # a group begins
        s.sample = sample
    s.model_outputs = [*s.model_outputs[1:], found["m0"]]
    s._step_index += 1
    return (found["prev_sample"],)
