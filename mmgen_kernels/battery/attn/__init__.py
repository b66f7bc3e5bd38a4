"""Cases of the family."""

from mmgen_kernels.battery.attn import attention, joint_attention, qk_norm_rope

CASES = [*attention.CASES, *joint_attention.CASES, *qk_norm_rope.CASES]
