"""Cases of the family."""

from mmgen_kernels.battery.vq import codebook, nearest_code, residual_quantize, vector_quantize

CASES = [*nearest_code.CASES, *vector_quantize.CASES, *codebook.CASES, *residual_quantize.CASES]
