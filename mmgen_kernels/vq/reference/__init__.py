"""The family in plain PyTorch: the oracle of the tests, the fallback on any device, the baseline of the benchmarks.

Shapes: x (..., D) with codebook (K, D), or x (H, ..., D) with codebook (H, K, D).
"""

from mmgen_kernels.vq.reference.codebook import (
    code_statistics,
    code_statistics_backward,
    gather_codes,
    gather_codes_backward,
    random_order,
    replace_dead_codes_,
    update_codebook_ema_,
)
from mmgen_kernels.vq.reference.entropy import code_entropy, code_entropy_backward
from mmgen_kernels.vq.reference.lookup import (
    gather,
    nearest_code,
    quantize,
    vector_quantize,
    vector_quantize_backward,
    with_heads,
)
from mmgen_kernels.vq.reference.residual import quantize_levels, residual_quantize, residual_quantize_backward

__all__ = [
    "code_entropy",
    "code_entropy_backward",
    "code_statistics",
    "code_statistics_backward",
    "gather",
    "gather_codes",
    "gather_codes_backward",
    "nearest_code",
    "quantize",
    "quantize_levels",
    "random_order",
    "replace_dead_codes_",
    "residual_quantize",
    "residual_quantize_backward",
    "update_codebook_ema_",
    "vector_quantize",
    "vector_quantize_backward",
    "with_heads",
]
