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


SHORT = 512  # queries, and keys


def is_short(T: int, S: int) -> bool:
    """By the lengths alone: with few samples and heads the two kernels would fill a chip better, but what could change a rounding
    may not depend on their number."""
    return T <= SHORT and S <= SHORT


def queries_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 2)
    return Configuration(64, 64, 4, 2)


def keys_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 2)
    return Configuration(64, 64, 4, 2)


def short_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration | None:
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 2)
    return Configuration(64, 64, 4, 2)


def bias_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 2)
    return Configuration(64, 64, 4, 2)


def resident_programs(device: torch.device, c: Configuration) -> int:
    """Of attention_backward_short: two blocks of 4 warps fit a multiprocessor, or one of 8. The interpreter has 4 of them."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return multiprocessors * (8 // c.num_warps)
