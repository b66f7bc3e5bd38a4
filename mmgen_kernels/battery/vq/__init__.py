"""Cases of nearest_code and vector_quantize."""

from mmgen_kernels.battery.vq import nearest_code, vector_quantize

CASES = [*nearest_code.CASES, *vector_quantize.CASES]
