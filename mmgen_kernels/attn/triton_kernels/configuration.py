"""Tile sizes by dtype, head dimension and chip, from what the compiler says of them ahead of time; no GPU has timed them.

A thread has 255 registers, and what does not fit them is spilled. The figures are those of Triton 3.9, registers a thread. No size
depends on a number of queries, keys, heads or samples. Tiles of 64 queries waste least at T = 257, where tiles of 128 would compute
384 rows and these 320, and are what one warpgroup of 4 warps multiplies at a time on sm_90; with 8 warps and 64 rows the second
warpgroup would repeat the work of the first.
"""

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
    if dtype == torch.float32:  # multiplied by FMA: 72 registers at D = 72, 194 at 128
        return Configuration(32, 32, 8, 1)
    if D > 192:  # 64 KiB of keys and values a stage; 246 registers at D = 256, where 64 keys spill
        return Configuration(64, 32, 4, 2)
    # sm_90: 154 registers and 68 KiB at D = 72, three blocks a multiprocessor; 172 and 113 KiB at 128, two
    return Configuration(64, 64, 4, 3 if D <= 128 else 2)


def queries_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    if dtype == torch.float32:
        return Configuration(32, 32, 8, 2)
    if capability < (9, 0):  # operands are in registers here: 4 warps spill from D = 64 on
        return Configuration(64, 64, 8, 2)
    # sm_90: 176 registers at D = 72; 64 keys spill from D = 160 on, 32 take 236 at 192
    return Configuration(64, 64 if D <= 128 else 32, 4, 2)


def keys_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    """Two sums of (keys, D) are what fills the registers."""
    if dtype == torch.float32:
        return Configuration(32, 32, 8, 2)
    if capability < (9, 0):
        return Configuration(64 if D <= 80 else 32, 64, 8, 2)
    if D > 128:  # both warpgroups compute the same weights, and each has half of the sums: 252 registers at D = 256
        return Configuration(32, 64, 8, 1 if D > 192 else 2)
    # sm_90: 237 registers at D = 72; 64 queries spill from D = 96 on, 32 take 212 there and 247 at 128
    return Configuration(64 if D <= 80 else 32, 64, 4, 2)


SHORT = 512  # queries, and keys


def is_short(T: int, S: int) -> bool:
    """By the lengths alone: with few samples and heads the two kernels would fill a chip better, but what could change a rounding
    may not depend on their number."""
    return T <= SHORT and S <= SHORT


def short_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration | None:
    """None: two kernels do it. The tiles are theirs, or the bits would be others."""
    if dtype == torch.float32 or D > 80 or capability < (9, 0):  # 664 bytes a thread are spilled at D = 72 on sm_80
        return None
    return Configuration(64, 64, 4, 1)


def bias_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> Configuration:
    """Without prefetch: of four tiles a step it would take 48 bytes a thread more than there are at D = 72."""
    return Configuration(32, 32, 8, 1) if dtype == torch.float32 else Configuration(64, 64, 4, 1)


def resident_programs(device: torch.device) -> int:
    """Of attention_backward_short: two blocks of 128 threads fit the registers of a multiprocessor. The interpreter has one."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)
