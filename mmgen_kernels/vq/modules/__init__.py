"""Quantizers as modules: mk.nn."""

from mmgen_kernels.vq.modules.quantizers import EMAVectorQuantizer, VectorQuantizer
from mmgen_kernels.vq.modules.residual import ResidualVectorQuantizer
from mmgen_kernels.vq.modules.usage import CodeUsage

__all__ = ["CodeUsage", "EMAVectorQuantizer", "ResidualVectorQuantizer", "VectorQuantizer"]
