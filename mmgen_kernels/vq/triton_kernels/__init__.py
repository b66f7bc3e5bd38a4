"""Triton kernels of the family and their launchers, imported at the first call."""

from mmgen_kernels.vq.triton_kernels.nearest_code import nearest_code, vector_quantize
from mmgen_kernels.vq.triton_kernels.residual import residual_quantize

__all__ = ["nearest_code", "residual_quantize", "vector_quantize"]
