"""The family on NVIDIA GPUs in CUDA C++: the launcher of csrc/schedule/schedule_cuda.cu, which prepares a step without Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.schedule.reference import scheduler_step_backward

__all__ = ["scheduler_step", "scheduler_step_backward"]


def scheduler_step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What needs a number of each sample first runs on Triton, beside whose further launches a start is little."""
    uncond, rescale, threshold = arguments[14], arguments[17], arguments[19]
    if threshold is not None or (uncond is not None and rescale != 0):
        from mmgen_kernels.schedule import triton_kernels

        return triton_kernels.scheduler_step(*arguments)
    return torch.ops.mmgen_kernels_cuda.scheduler_step(*arguments)
