"""Cases of nearest_code, vector_quantize and residual_quantize."""

from mmgen_kernels.battery.vq import nearest_code, residual_quantize, vector_quantize

CASES = [*nearest_code.CASES, *vector_quantize.CASES, *residual_quantize.CASES]
