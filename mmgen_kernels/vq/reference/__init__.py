"""The family in plain PyTorch: the oracle of the tests, the fallback on any device, the baseline of the benchmarks.

Shapes: x (..., D) with codebook (K, D), or x (H, ..., D) with codebook (H, K, D).
"""

from mmgen_kernels.vq.reference.entropy import code_entropy, code_entropy_backward
from mmgen_kernels.vq.reference.lookup import (
    gather,
    nearest_code,
    quantize,
    vector_quantize,
    vector_quantize_backward,
    with_heads,
)

__all__ = [
    "code_entropy",
    "code_entropy_backward",
    "gather",
    "nearest_code",
    "quantize",
    "vector_quantize",
    "vector_quantize_backward",
    "with_heads",
]
