"""Modules of all families."""

from mmgen_kernels.blocks.joint import JointDiTBlock
from mmgen_kernels.blocks.modules import DiTBlock, FinalLayer
from mmgen_kernels.modulation.modules import AdaLayerNorm, AdaLayerNormZero, AdaLNZeroOutput, RMSNorm
from mmgen_kernels.vq.modules import CodeUsage, EMAVectorQuantizer, ResidualVectorQuantizer, VectorQuantizer

__all__ = [
    "AdaLNZeroOutput",
    "AdaLayerNorm",
    "AdaLayerNormZero",
    "CodeUsage",
    "DiTBlock",
    "EMAVectorQuantizer",
    "FinalLayer",
    "JointDiTBlock",
    "RMSNorm",
    "ResidualVectorQuantizer",
    "VectorQuantizer",
]
