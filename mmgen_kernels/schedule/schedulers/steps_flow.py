"""`step` of the flows' further classes; see steps.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.philox.ops import fold_in
from mmgen_kernels.schedule.ops import scheduler_step
from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Table, Unplanned, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_shared import FP32, of_evaluation, refuse_indices, step_index


def flow_match_heun(
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
    k, first = step_index(s, timestep), s.dt is None
    churn = {"s_churn": float(s_churn), "s_tmin": float(s_tmin), "s_tmax": float(s_tmax), "s_noise": float(s_noise)}
    table, row = of_evaluation(stepper, s, k, first, **churn)
    dt = between(table, row if first else row - 1)
    if not first and (isinstance(s.dt, Tensor) or s.dt != dt):
        raise Unplanned(f"a pair's second step must be churned as its first, which went {s.dt}, got {s_churn=}, which goes {dt}")

    prediction, _ = of_channels(table.plan, model_output, sample)
    noise = stepper.draw(table, prediction, generator, prediction.dtype) if table.plan.draws_noise[row] else None
    wide = torch.promote_types(FP32, prediction.dtype)
    last = None if first else s.sample  # which diffusers' own has only after its first step
    named = {"sample": sample, "model_output": prediction, "last_sample": last, "derivative": s.prev_derivative}
    kept = dict.fromkeys(table.plan.outputs[1:], wide) if first else {}
    found = stepper.run(table, row, named, {"prev_sample": prediction.dtype, **kept}, noise)
    if first:
        s.sample, s.prev_derivative, s.dt = found.get("start", sample), found["slope"], dt
    else:
        s.sample = s.prev_derivative = s.dt = None
    s._step_index += 1
    return (found["prev_sample"],)


def between(table: Table, row: int) -> float:
    """How far the pair goes whose first step the row is; alone, the last first step is one of Euler's."""
    if row + 1 < len(table.plan.rows):
        return 2 * table.plan.rows[row + 1][1][table.plan.inputs.index("derivative")]
    return table.plan.rows[row][1][table.plan.inputs.index("model_output")]


def flow_match_lcm(
    stepper: Stepper, s: Any, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None
) -> tuple[Tensor, ...]:
    refuse_indices(s, timestep)
    check_tensors(model_output, sample)
    factors = s._scale_factors if s._upscale_mode else None
    if factors and len(s.timesteps) != len(factors) + 1:
        raise Unplanned(f"scale_factors must be one for each of {len(s.timesteps)} steps but the last, got {len(factors)}")
    if s._init_size is None or s.step_index is None:
        s._init_size = model_output.shape[2:]
    k = step_index(s, timestep)
    table = stepper.table(s)
    prediction, _ = of_channels(table.plan, model_output, sample)
    wide = torch.promote_types(FP32, prediction.dtype)
    if factors and k < len(factors):
        size = [round(factors[k] * length) for length in s._init_size]
        found = resized(stepper, table, k, sample, prediction, size, s._upscale_mode, generator)
    else:
        named = {"sample": sample, "model_output": prediction}
        noise = stepper.draw(table, prediction, generator, wide)
        found = stepper.run(table, k, named, {"prev_sample": prediction.dtype}, noise)["prev_sample"]
    s._step_index += 1
    return (found,)


def resized(
    stepper: Stepper, table: Table, k: int, sample: Tensor, prediction: Tensor, size: list[int], mode: str, generator: Generators
) -> Tensor:
    """The data, resized, and then noise: three launches."""
    row, wide = table.rows[k], torch.promote_types(FP32, prediction.dtype)
    derive, last = torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 3, dtype=torch.float64)
    derive[0, 0, :2], derive[0, 1, 2] = row[0, :2], 1
    last[0, 1, 0], last[0, 1, 2] = row[1, 2], row[1, 3]
    (data,) = scheduler_step([sample, prediction], derive, 0, dtypes=[wide])
    data = torch.nn.functional.interpolate(data, size=size, mode=mode)
    noise = stepper.draw(table, data, generator, wide)
    if stepper.noise == "philox":
        noise = fold_in(noise, k)
    (prev,) = scheduler_step([data], last, 0, noise=noise, dtypes=[prediction.dtype])
    return prev
