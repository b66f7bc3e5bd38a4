"""Modules of all families."""

from mmgen_kernels.vq.modules import CodeUsage, EMAVectorQuantizer, ResidualVectorQuantizer, VectorQuantizer

__all__ = ["CodeUsage", "EMAVectorQuantizer", "ResidualVectorQuantizer", "VectorQuantizer"]
