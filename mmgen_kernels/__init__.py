"""Fused operations for multimodal generative models."""

from mmgen_kernels import backends
from mmgen_kernels.backends import backend_report, use_backend
from mmgen_kernels.philox.ops import fold_in, philox_integers, philox_normal, philox_uniform
from mmgen_kernels.vq.ops import RVQOutput, VQOutput, nearest_code, residual_quantize, vector_quantize

__version__ = "0.1.0"
__all__ = [
    "RVQOutput",
    "VQOutput",
    "backend_report",
    "fold_in",
    "nearest_code",
    "philox_integers",
    "philox_normal",
    "philox_uniform",
    "residual_quantize",
    "use_backend",
    "vector_quantize",
]

backends.load_library()
