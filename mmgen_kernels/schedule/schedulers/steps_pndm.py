"""PNDM's `step`, and its two halves, which may be called by themselves; as in steps.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner.pndm import kept_before
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Table, Unplanned, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_shared import require_timesteps


def pndm(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    if s.num_inference_steps is not None and s.counter < len(s.prk_timesteps) and not s.config["skip_prk_steps"]:
        return prk(stepper, s, model_output, timestep, sample)
    return plms(stepper, s, model_output, timestep, sample)


def prk(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    require_timesteps(s)
    check_tensors(model_output, sample)
    table, row, counter = of_evaluation(stepper, s, timestep, "prk")
    prediction, _ = of_channels(table.plan, model_output, sample)
    phase = counter % 4
    if phase == 0 and isinstance(s.cur_model_output, Tensor):
        raise Unplanned("cur_model_output must be 0 where a step begins")
    start = sample if phase == 0 or s.cur_sample is None else s.cur_sample
    named = {"sample": sample, "model_output": prediction, "last_sample": start}
    named["total"] = s.cur_model_output if isinstance(s.cur_model_output, Tensor) else None
    table.require(row, named)
    dtypes = {"prev_sample": torch.promote_types(start.dtype, prediction.dtype)}
    if phase < 3:
        dtypes["total"] = prediction.dtype
    found = stepper.run(table, row, named, dtypes)
    if phase == 0:
        s.ets.append(model_output)
        s.cur_sample = sample
    s.cur_model_output = found.get("total", 0)
    s.counter += 1
    return (found["prev_sample"],)


def plms(stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, ...]:
    require_timesteps(s)
    if not s.config["skip_prk_steps"] and len(s.ets) < 3:
        raise ValueError(f"ets must have 3 outputs of prk before plms begins without skip_prk_steps, got {len(s.ets)}")
    check_tensors(model_output, sample)
    table, row, counter = of_evaluation(stepper, s, timestep, "plms")
    prediction, _ = of_channels(table.plan, model_output, sample)
    named = {"sample": sample, "model_output": prediction, "last_sample": s.cur_sample}
    named |= {f"m{j}": m for j, m in enumerate(reversed(s.ets), 1)}
    table.require(row, named)
    of_sample = s.cur_sample if "last_sample" in table.used[row] else sample
    dtypes = {"prev_sample": torch.promote_types(of_sample.dtype, prediction.dtype)}
    found = stepper.run(table, row, named, dtypes)
    kept = len(s.ets)
    if counter != 1:
        s.ets = [*s.ets[-3:], model_output]
        if counter == 0 and kept == 0:
            s.cur_sample = sample
    elif kept == 1:
        s.cur_sample = None
    s.counter += 1
    return (found["prev_sample"],)


def of_evaluation(stepper: Stepper, s: Any, timestep: Any, method: str) -> tuple[Table, int, int]:
    """
    The plan of the run, its row, and the number of the evaluation. Where the past is not the run's, or the timestep is none of it,
    a plan of that evaluation alone.
    """
    counter, place = s.counter, stepper.place(s, timestep)
    as_usual = len(s.ets) == kept_before(counter, len(s.prk_timesteps)) and (counter < len(s.prk_timesteps)) == (method == "prk")
    begin = max(place - counter, 0)
    if as_usual and place >= 0 and begin + counter < len(s.timesteps):
        table = stepper.table(s, begin=begin)
        times = table.plan.timesteps
        if place >= counter or times[place] == times[counter]:  # a timestep that comes twice may be found at its first place
            return table, counter, counter
    return stepper.table(s, alone=int(timestep), counter=counter, kept=len(s.ets), method=method), 0, counter
