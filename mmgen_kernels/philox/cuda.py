"""The family on NVIDIA GPUs in CUDA C++: the launchers of csrc/philox/philox_cuda.cu."""

from __future__ import annotations

import torch
from torch import Tensor


def philox_integers(key: Tensor, shape: list[int]) -> Tensor:
    return torch.ops.mmgen_kernels_cuda.philox_integers(key, shape)


def philox_uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.ops.mmgen_kernels_cuda.philox_uniform(key, shape, dtype)


def philox_normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.ops.mmgen_kernels_cuda.philox_normal(key, shape, dtype)


def fold_in(key: Tensor, i: Tensor) -> Tensor:
    return torch.ops.mmgen_kernels_cuda.fold_in(key, i)
