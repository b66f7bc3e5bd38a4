"""Cases of the family."""

from mmgen_kernels.battery.vq import code_entropy, codebook, nearest_code, residual_quantize, vector_quantize

CASES = [
    *nearest_code.CASES,
    *vector_quantize.CASES,
    *codebook.CASES,
    *residual_quantize.CASES,
    *code_entropy.CASES,
]
