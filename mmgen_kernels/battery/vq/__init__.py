"""Cases of the family."""

from mmgen_kernels.battery.vq import codebook, nearest_code, vector_quantize

CASES = [*nearest_code.CASES, *vector_quantize.CASES, *codebook.CASES]
