"""Liger Kernel's modulated RMS norm, a GPU peer: x * rstd * (1 + scale) + shift. LinkedIn, BSD-2-Clause."""

from torch import Tensor


def adaln(x: Tensor, y: Tensor, vectors: Tensor, model) -> tuple[Tensor, ...]:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    _, shift, scale = vectors.chunk(3, -1)
    return (LigerModulatedRMSNormFunction.apply(x, None, scale, shift, 1e-6, 0.0, "llama", False),)  # not in place: x is used again
