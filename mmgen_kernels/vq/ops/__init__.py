"""The public functions of the family: what they compute, what they check, their schemas and fakes."""

from mmgen_kernels.vq.ops.checks import FAMILY, GRADIENTS, METRICS, PRECISIONS
from mmgen_kernels.vq.ops.codebook import (
    CodeStatistics,
    KMeansOutput,
    code_statistics,
    gather_codes,
    kmeans,
    replace_dead_codes_,
    update_codebook_ema_,
)
from mmgen_kernels.vq.ops.entropy import CodeEntropy, code_entropy
from mmgen_kernels.vq.ops.lookup import VQOutput, nearest_code, vector_quantize
from mmgen_kernels.vq.ops.residual import RVQOutput, residual_quantize

__all__ = [
    "FAMILY",
    "GRADIENTS",
    "METRICS",
    "PRECISIONS",
    "CodeEntropy",
    "CodeStatistics",
    "KMeansOutput",
    "RVQOutput",
    "VQOutput",
    "code_entropy",
    "code_statistics",
    "gather_codes",
    "kmeans",
    "nearest_code",
    "replace_dead_codes_",
    "residual_quantize",
    "update_codebook_ema_",
    "vector_quantize",
]
