"""What the public functions of every family refuse alike. Metadata only: a look at a value would stop the GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NORMS = ("layer", "rms")


def check_floats(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dtype(name, tensor.dtype)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype}")


def check_device(name: str, tensor: Tensor, other: str, than: Tensor) -> None:
    if tensor.device != than.device:
        raise ValueError(f"{name} must be on {other}'s device {than.device}, got {tensor.device}")


def check_integers(name: str, tensor: Tensor, other: str, than: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    check_device(name, tensor, other, than)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_eps(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
