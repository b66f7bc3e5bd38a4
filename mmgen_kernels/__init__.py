"""Fused operations for multimodal generative models."""

from mmgen_kernels import backends
from mmgen_kernels.backends import backend_report, use_backend
from mmgen_kernels.patching import patch
from mmgen_kernels.philox.ops import fold_in, philox_integers, philox_normal, philox_uniform
from mmgen_kernels.vq.ops import VQOutput, nearest_code, vector_quantize

__version__ = "0.1.0"
__all__ = [
    "VQOutput",
    "backend_report",
    "fold_in",
    "nearest_code",
    "patch",
    "philox_integers",
    "philox_normal",
    "philox_uniform",
    "use_backend",
    "vector_quantize",
]

backends.load_library()
