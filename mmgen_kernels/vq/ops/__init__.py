"""The public functions of the family: what they compute, what they check, their schemas and fakes."""

from mmgen_kernels.vq.ops.checks import DTYPES, FAMILY, GRADIENTS, METRICS, PRECISIONS
from mmgen_kernels.vq.ops.lookup import VQOutput, nearest_code, vector_quantize
from mmgen_kernels.vq.ops.residual import RVQOutput, residual_quantize

__all__ = [
    "DTYPES",
    "FAMILY",
    "GRADIENTS",
    "METRICS",
    "PRECISIONS",
    "RVQOutput",
    "VQOutput",
    "nearest_code",
    "residual_quantize",
    "vector_quantize",
]
