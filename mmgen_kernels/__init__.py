"""Fused operations for multimodal generative models."""

from mmgen_kernels import backends
from mmgen_kernels.backends import backend_report, use_backend
from mmgen_kernels.philox.ops import fold_in, philox_integers, philox_normal, philox_uniform
from mmgen_kernels.vq.ops import CodeEntropy, VQOutput, code_entropy, nearest_code, vector_quantize

__version__ = "0.1.0"
__all__ = [
    "CodeEntropy",
    "VQOutput",
    "backend_report",
    "code_entropy",
    "fold_in",
    "nearest_code",
    "philox_integers",
    "philox_normal",
    "philox_uniform",
    "use_backend",
    "vector_quantize",
]

backends.load_library()
