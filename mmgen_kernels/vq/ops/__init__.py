"""The public functions of the family: what they compute, what they check, their schemas and fakes."""

from mmgen_kernels.vq.ops.checks import DTYPES, FAMILY, GRADIENTS, METRICS, PRECISIONS
from mmgen_kernels.vq.ops.entropy import CodeEntropy, code_entropy
from mmgen_kernels.vq.ops.lookup import VQOutput, nearest_code, vector_quantize

__all__ = [
    "DTYPES",
    "FAMILY",
    "GRADIENTS",
    "METRICS",
    "PRECISIONS",
    "CodeEntropy",
    "VQOutput",
    "code_entropy",
    "nearest_code",
    "vector_quantize",
]
