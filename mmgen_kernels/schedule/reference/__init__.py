"""The family in plain PyTorch: the oracle of the tests, the fallback on any device, the baseline of the benchmarks."""

from mmgen_kernels.schedule.reference.steps import (
    FASTEST,
    INPUTS,
    SLOWEST,
    add_noise,
    add_noise_backward,
    guidance,
    guidance_backward,
    scheduler_step,
    scheduler_step_backward,
)

__all__ = [
    "FASTEST",
    "INPUTS",
    "SLOWEST",
    "add_noise",
    "add_noise_backward",
    "guidance",
    "guidance_backward",
    "scheduler_step",
    "scheduler_step_backward",
]
