"""The family in plain PyTorch: oracle of the tests, fallback on every device, baseline of the benchmarks."""

from mmgen_kernels.attn.reference.attention import attention, attention_backward, lse_dtype, wide_dtype
from mmgen_kernels.attn.reference.joint_attention import joint_attention, joint_attention_backward
from mmgen_kernels.attn.reference.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward

__all__ = [
    "attention",
    "attention_backward",
    "joint_attention",
    "joint_attention_backward",
    "lse_dtype",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "wide_dtype",
]
