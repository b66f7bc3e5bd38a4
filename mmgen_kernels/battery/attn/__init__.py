"""Cases of the family."""

from mmgen_kernels.battery.attn import attention, qk_norm_rope

CASES = [*attention.CASES, *qk_norm_rope.CASES]
