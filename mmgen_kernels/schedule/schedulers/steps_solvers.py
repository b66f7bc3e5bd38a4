"""`step` of further solvers with history; see steps.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.philox.ops import fold_in, philox_normal
from mmgen_kernels.schedule.planner.sasolver import history, orders
from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Unplanned, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_shared import (
    history_of,
    multistep,
    require_timesteps,
    step_index,
    with_history,
)


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


def sasolver(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    check_tensors(model_output, sample)
    require_timesteps(s)
    k, full = step_index(s, timestep), history(s.config)
    place, times = stepper.place(s, timestep), stepper.table(s).plan.schedule.timesteps
    if place != k and float(s.tau_func(int(timestep))) != float(s.tau_func(int(times[k]))):
        raise Unplanned(f"timestep must have the tau of step {k}, whose is {int(times[k])}, got {timestep}")
    table, row = with_history(stepper, s, k, s.lower_order_nums, full, tau_func=s.tau_func)
    prediction, _ = of_channels(table.plan, model_output, sample)
    if prediction.shape != model_output.shape:
        raise Unplanned(f"model_output must have no channels but the sample's, got shape {tuple(model_output.shape)}")
    named = {"sample": sample, "model_output": prediction, "last_sample": s.last_sample, **history_of(s)}
    named["last_noise"] = getattr(s, "last_noise", None)
    table.require(row, named)  # before a generator is used
    noise, noisy = None, any(line[-1] != 0 for line in table.plan.rows[row])
    if noisy or stepper.noise == "torch":  # diffusers draws where tau is 0, too
        noise = stepper.draw(table, prediction, generator, prediction.dtype)
    if noise is not None and stepper.noise == "philox":  # the next step's corrector asks for it
        noise = philox_normal(sample.shape, fold_in(noise, k), dtype=prediction.dtype)
    dtypes = dict.fromkeys(table.plan.outputs, sample.dtype) | {"m0": torch.promote_types(sample.dtype, prediction.dtype)}
    found = stepper.run(table, row, named, dtypes, noise if noisy else None)
    s.this_predictor_order, s.this_corrector_order = orders(s.config, k - s.lower_order_nums, len(s.timesteps), k)
    s.last_sample, s.last_noise = found["corrected"], noise
    s.model_outputs = [*s.model_outputs[1:], found["m0"]]
    s.timestep_list = [*s.timestep_list[1:], timestep]
    s.lower_order_nums = min(s.lower_order_nums + 1, full)
    s._step_index += 1
    return (found["prev_sample"],)
