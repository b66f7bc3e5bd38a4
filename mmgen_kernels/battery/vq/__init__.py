"""Cases of the family's operators."""

from mmgen_kernels.battery.vq import code_entropy, nearest_code, vector_quantize

CASES = [*nearest_code.CASES, *vector_quantize.CASES, *code_entropy.CASES]
