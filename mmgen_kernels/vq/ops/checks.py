"""What the public functions of the family refuse. Metadata only: a look at a value would stop the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice, check_device, check_floats

FAMILY = "vq"
METRICS = ("l2", "cosine", "dot")
PRECISIONS = ("exact", "fast")
GRADIENTS = ("straight_through", "rotation")
MAX_CODES = 2**31 - 1


def check_lookup(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str) -> None:
    check_floats("x", x)
    check_codebook(codebook)
    if x.dim() < codebook.dim() - 1:
        raise ValueError(f"x must be (H, ..., D) for a codebook (H, K, D), got shape {tuple(x.shape)}")
    if x.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"x and codebook must agree in D, got x {tuple(x.shape)} and codebook {tuple(codebook.shape)}")
    if codebook.dim() == 3 and x.shape[0] != codebook.shape[0]:
        raise ValueError(f"x and codebook must agree in H, got x {tuple(x.shape)} and codebook {tuple(codebook.shape)}")
    check_device("codebook", codebook, "x", x)
    check_mask(mask, x)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)


def check_codebook(codebook: Tensor, name: str = "codebook") -> None:
    check_floats(name, codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"{name} must be (K, D) or (H, K, D), got shape {tuple(codebook.shape)}")
    if not 1 <= codebook.shape[-2] <= MAX_CODES:
        raise ValueError(f"{name} must hold 1 to 2^31 - 1 codes, got K = {codebook.shape[-2]}")
    if codebook.shape[-1] < 1:
        raise ValueError(f"{name} must have D >= 1, got shape {tuple(codebook.shape)}")


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must have x's leading shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    check_device("mask", mask, "x", x)


def check_indices(indices: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")


def check_key(key: Tensor, device: torch.device) -> None:
    if not isinstance(key, Tensor) or key.dtype not in (torch.int64, torch.uint64):
        raise TypeError(f"key must be an int64 tensor, got {getattr(key, 'dtype', type(key).__name__)}")
    if key.shape != (2,):
        raise ValueError(f"key must be (seed, offset), of shape (2,), got {tuple(key.shape)}")
    if key.device != device:
        raise ValueError(f"key must be on x's device {device}, got {key.device}")


def check_gradient(gradient: str) -> None:
    check_choice("gradient", gradient, GRADIENTS)
