"""`step` of the CogVideoX classes; see steps.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmgen_kernels.schedule.schedulers.noise import Generators
from mmgen_kernels.schedule.schedulers.stepper import Stepper, check_tensors, of_channels
from mmgen_kernels.schedule.schedulers.steps_shared import by_timestep, first_two, require_timesteps


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
