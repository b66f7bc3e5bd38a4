"""What the steps of several classes share: the row of a call, the step index, history, and the dtypes of results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import ANY_TIMESTEP, Stepper, Table, Unplanned, check_tensors, of_channels

FP32 = torch.float32


class Bare(tuple):
    """Results that stay a tuple whatever `return_dict` asks for."""


def by_timestep(stepper: Stepper, s: Any, timestep: Any, **run: Any) -> tuple[Table, int]:
    """Of a scheduler that counts no steps: the row of the timestep, or a table of that timestep alone."""
    k = stepper.place(s, timestep)
    if 0 <= k < len(s.timesteps):
        return stepper.table(s, **run), k
    if stepper.class_name not in ANY_TIMESTEP or not 0 <= int(timestep) < s.config["num_train_timesteps"]:
        raise Unplanned(f"timestep must be one of the run's, got {timestep}")
    return stepper.table(s, alone=int(timestep), **run), 0


def require_timesteps(s: Any) -> None:
    if s.num_inference_steps is None:
        raise ValueError("num_inference_steps is None: call set_timesteps before step")


def step_index(s: Any, timestep: Any) -> int:
    if s._step_index is None:
        s._init_step_index(timestep)
    k = s._step_index
    if not 0 <= k < s.timesteps.shape[0]:  # len() of a tensor takes 0.6 us
        raise Unplanned(f"step must be one of the run's {len(s.timesteps)}, got number {k}")
    return k


def require_timestep_of(stepper: Stepper, s: Any, k: int, timestep: Any) -> None:
    """Of a class whose step k has coefficients by its timestep; the same one may stand at several places."""
    place, times = stepper.place(s, timestep), stepper.table(s).plan.schedule.timesteps
    if place != k and not (0 <= place < len(times) and times[place] == times[k]):
        raise Unplanned(f"timestep must be that of step {k}, got {timestep}")


def refuse_indices(s: Any, timestep: Any) -> None:
    if isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64)):
        raise ValueError(f"timestep must be one of scheduler.timesteps, not an index, got {timestep!r}")


def first_two(
    stepper: Stepper, table: Table, k: int, prediction: Tensor, sample: Tensor, noise: Tensor | None, variance: Tensor | None = None
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    if variance is None:
        return stepper.run_pair(table, k, sample, prediction, (dtype,) * len(table.plan.outputs), noise)
    named = {"sample": sample, "model_output": prediction}
    return tuple(stepper.run(table, k, named, dict.fromkeys(table.plan.outputs, dtype), noise, variance).values())


def in_sigma_space(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    generator: Generators,
    run: dict[str, Any],
    original: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """A step of Euler's kind: the sample in the model output's dtype, the data in fp32 at least, or as the caller has them."""
    refuse_indices(s, timestep)
    check_tensors(model_output, sample)
    k = step_index(s, timestep)
    table = stepper.table(s, **run)
    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, prediction, generator, prediction.dtype) if table.plan.draws_noise[k] else None
    source, dtypes = prediction, (prediction.dtype, torch.promote_types(FP32, prediction.dtype))
    if original is not None:
        check_tensors(original, sample)
        source, _ = of_channels(table.plan, original, sample)
    prev, data = stepper.run_pair(table, k, sample, source, dtypes, noise)
    s._step_index += 1
    return prev, data if original is None else original


def multistep(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
    dtype_of_noise: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """A step of a solver whose history is its converted model outputs, with noise where the plan has some."""
    check_tensors(model_output, sample)
    require_timesteps(s)
    k = step_index(s, timestep)
    table, row = with_history(stepper, s, k, s.lower_order_nums, s.config["solver_order"])
    prediction, _ = of_channels(table.plan, model_output, sample)
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    named = {"sample": sample, "model_output": prediction, **history_of(s)}
    table.require(row, named)  # before a generator is used
    noise = None
    if table.plan.draws_noise[row]:
        given = variance_noise is not None
        noise = variance_noise if given else stepper.draw(table, prediction, generator, dtype_of_noise or dtype)
    found = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs, dtype), noise)
    remember(s, found["m0"])
    s._step_index += 1
    return (found["prev_sample"],)


def with_history(stepper: Stepper, s: Any, k: int, kept: int, full: int, **run: Any) -> tuple[Table, int]:
    """The plan of a run that began where the scheduler's history does, and its row of step k. `full` tell all there is."""
    begin = k - kept if kept < full else 0
    if begin < 0:
        raise Unplanned(f"step {k} must have at most {k} steps before it, got a history of {kept}")
    return stepper.table(s, begin=begin, **run), k - begin


def of_evaluation(stepper: Stepper, s: Any, k: int, first: bool, **run: Any) -> tuple[Table, int]:
    """The plan whose evaluations are first ones where the scheduler says that this one is, and its row."""
    begin = k % 2 if first else (k + 1) % 2
    if begin > k:
        raise Unplanned("step 0 must be the first evaluation of its step, got a sample of one before")
    return stepper.table(s, begin=begin, **run), k - begin


def history_of(s: Any) -> dict[str, Tensor | None]:
    return {f"m{j}": m for j, m in enumerate(reversed(s.model_outputs), 1)}


def remember(s: Any, m0: Tensor) -> None:
    s.model_outputs = [*s.model_outputs[1:], m0]
    s.lower_order_nums = min(s.lower_order_nums + 1, s.config["solver_order"])
