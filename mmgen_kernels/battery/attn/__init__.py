"""Cases of the family."""

from mmgen_kernels.battery.attn import attention

CASES = attention.CASES
