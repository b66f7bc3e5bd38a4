"""`step` of the CogVideoX classes; see steps.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Unplanned, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_shared import Bare, by_timestep, first_two, require_timesteps


def cogvideox_ddim(
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
    """What stands after `sample` is diffusers', which does not read it either."""
    check_tensors(model_output, sample)
    require_timesteps(s)
    table, k = by_timestep(stepper, s, timestep)
    prediction, _ = of_channels(table.plan, model_output, sample)
    return first_two(stepper, table, k, prediction, sample, None)


def cogvideox_dpm(
    stepper: Stepper,
    s: Any,
    model_output: Tensor,
    old_pred_original_sample: Tensor | None,
    timestep: Any,
    timestep_back: Any,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """eta, use_clipped_model_output and variance_noise are diffusers', which does not read them either."""
    check_tensors(model_output, sample)
    require_timesteps(s)
    k, old = stepper.place(s, timestep), old_pred_original_sample
    if not 0 <= k < len(s.timesteps):
        raise Unplanned(f"timestep must be one of the run's, got {timestep}")
    if old is not None and (k == 0 or timestep_back is None or stepper.place(s, timestep_back) != k - 1):
        raise Unplanned(f"timestep_back must be that of the step before {timestep}, got {timestep_back}")
    table, row = (stepper.table(s), k) if old is not None else (stepper.table(s, begin=k), 0)
    prediction, _ = of_channels(table.plan, model_output, sample)
    continues = "m1" in table.used[row]
    noise = stepper.draw(table, sample, generator, sample.dtype)
    if continues and stepper.noise == "torch":  # diffusers throws the first noise away
        noise = stepper.draw(table, sample, generator, sample.dtype)
    named = {"sample": sample, "model_output": prediction, "m1": old}
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    results = stepper.run(table, row, named, dict.fromkeys(table.plan.outputs, dtype), noise).values()
    return tuple(results) if continues else Bare(results)
