"""Triton kernels of the family and their launchers, imported at the first call."""

from mmgen_kernels.attn.triton_kernels.backward import attention_backward
from mmgen_kernels.attn.triton_kernels.forward import attention
from mmgen_kernels.attn.triton_kernels.joint import joint_attention, joint_attention_backward
from mmgen_kernels.attn.triton_kernels.rope_backward import qk_norm_rope_backward
from mmgen_kernels.attn.triton_kernels.rope_forward import qk_norm_rope

__all__ = [
    "attention",
    "attention_backward",
    "joint_attention",
    "joint_attention_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
]
