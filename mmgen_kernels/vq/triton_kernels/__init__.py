"""Triton kernels of the family and their launchers, imported at the first call."""

from mmgen_kernels.vq.triton_kernels.codebook import (
    code_statistics,
    code_statistics_backward,
    gather_codes,
    gather_codes_backward,
    update_codebook_ema_,
)
from mmgen_kernels.vq.triton_kernels.dead_codes import replace_dead_codes_
from mmgen_kernels.vq.triton_kernels.nearest_code import nearest_code, vector_quantize
from mmgen_kernels.vq.triton_kernels.residual import residual_quantize
from mmgen_kernels.vq.triton_kernels.residual_backward import residual_quantize_backward

__all__ = [
    "code_statistics",
    "code_statistics_backward",
    "gather_codes",
    "gather_codes_backward",
    "nearest_code",
    "replace_dead_codes_",
    "residual_quantize",
    "residual_quantize_backward",
    "update_codebook_ema_",
    "vector_quantize",
]
