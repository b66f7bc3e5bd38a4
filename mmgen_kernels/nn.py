"""Modules of all families."""

from mmgen_kernels.vq.modules import CodeUsage, EMAVectorQuantizer, VectorQuantizer

__all__ = ["CodeUsage", "EMAVectorQuantizer", "VectorQuantizer"]
