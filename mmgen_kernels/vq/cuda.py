"""The lookup of narrow vectors on NVIDIA GPUs in CUDA C++: the launchers of csrc/vq/nearest_code_cuda.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.vq import reference

MAX_DIM = 64  # a row fits the registers of the warps that sweep it


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str) -> Tensor:
    """Launcher of the operator; wider vectors go to the Triton kernels. "fast" is answered exactly, as there."""
    if x.shape[-1] > MAX_DIM:
        from mmgen_kernels.vq import triton_kernels  # Triton may be missing where it is not needed

        return triton_kernels.nearest_code(x, codebook, mask, metric, precision)
    return torch.ops.mmgen_kernels_cuda.nearest_code(x, codebook, mask, metric, precision)


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, beta: float, legacy_beta: bool, gradient: str, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of the operator: the lookup here, gather and losses in plain PyTorch, like the backward."""
    indices = nearest_code(x, codebook, mask, metric, precision)
    return reference.quantize(x, codebook, indices, beta, legacy_beta, gradient)
