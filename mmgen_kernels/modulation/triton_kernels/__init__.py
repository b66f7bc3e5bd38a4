"""Triton kernels of the family and their launchers, imported at the first call."""

from mmgen_kernels.modulation.triton_kernels.backward import (
    adaln_backward,
    gate_residual_adaln_backward,
    gate_residual_backward,
)
from mmgen_kernels.modulation.triton_kernels.forward import adaln, gate_residual, gate_residual_adaln

__all__ = [
    "adaln",
    "adaln_backward",
    "gate_residual",
    "gate_residual_adaln",
    "gate_residual_adaln_backward",
    "gate_residual_backward",
]
