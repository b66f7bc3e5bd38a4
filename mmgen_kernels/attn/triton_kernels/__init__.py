"""Triton kernels of the family and their launchers, imported at the first call."""

from mmgen_kernels.attn.triton_kernels.backward import attention_backward
from mmgen_kernels.attn.triton_kernels.forward import attention

__all__ = ["attention", "attention_backward"]
