"""Tile sizes by dtype, head dimension and chip, from what the compiler says of them ahead of time; no GPU has timed them.

A thread has 255 registers, and what does not fit them is spilled. The figures are those of Triton 3.9, registers a thread. No size
depends on a number of queries, keys, heads or samples. Tiles of 64 queries waste least at T = 257, where tiles of 128 would compute
384 rows and these 320, and are what one warpgroup of 4 warps multiplies at a time on sm_90; with 8 warps and 64 rows the second
half of the warps would repeat the work of the first where one product goes into another, on sm_80 too.

Whether there is a bias, or a packed batch, may decide as well: of a packed batch what changes no bit, the number of stages alone.
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


def forward_configuration(
    dtype: torch.dtype, D: int, capability: tuple[int, int], bias: bool = False, descriptors: bool = False
) -> Configuration:
    if dtype == torch.float32:  # multiplied by FMA: 72 registers at D = 72, 194 at 128
        return Configuration(32, 32, 8, 1)
    # 64 KiB of keys and values a stage at D = 256, and 246 registers, where 64 keys spill. A bias has as many values as there are
    # weights, and an address for each: with 64 keys 80 bytes a thread spill at D = 128 for sm_90, 32 take 250 registers
    if D > 192 or (bias and (D > 96 or capability < (9, 0))):
        return Configuration(64, 32, 4, 2)
    # sm_90: by addresses 152 registers and 68 KiB at D = 72, three blocks a multiprocessor; 170 and 113 KiB at 128, two. By
    # descriptors 121 and 49 KiB with two stages: four blocks, with as many tiles on their way as three with three stages have,
    # and another block to multiply while one takes maxima. At 128 their barriers would make 114 KiB of three stages: one block
    return Configuration(64, 64, 4, 3 if D <= 128 and not descriptors else 2)


def queries_configuration(
    dtype: torch.dtype, D: int, capability: tuple[int, int], bias: bool = False, packed: bool = False
) -> Configuration:
    if dtype == torch.float32:
        return Configuration(32, 32, 8, 2)
    if capability < (9, 0):  # operands are in registers here: 32 keys take all 255 at D = 72, and of a bias 32 spill 240 bytes
        if D > 128 or (bias and D > 96):
            return Configuration(64, 64, 8, 2)
        return Configuration(64, 16 if bias else 32, 4, 2)
    # sm_90: 176 registers at D = 72; 64 keys spill from D = 160 on, 32 take 236 at 192. With a bias 64 spill at D = 96, 8 bytes
    block_n = 32 if D > 128 or (bias and D > 80) else 64
    # a packed tile's bounds are in registers: at D = 128 prefetch would spill 56 bytes, without it 223 registers are enough
    prefetch = not (packed and 96 < D <= 128 and capability < (10, 0))
    return Configuration(64, block_n, 4, 2 if prefetch else 1)


def keys_configuration(dtype: torch.dtype, D: int, capability: tuple[int, int], joint: bool = False) -> Configuration:
    """Two sums of (keys, D) are what fills the registers."""
    if dtype == torch.float32:
        return Configuration(32, 32, 8, 2)
    if capability < (9, 0):
        return Configuration(32, 64, 4 if D <= 128 else 8, 2)
    if D > 128:  # both warpgroups compute the same weights, and each has half of the sums: 252 registers at D = 256
        return Configuration(32, 64, 8, 1 if D > 192 else 2)
    # sm_90: 227 registers at D = 72; 64 queries spilled from D = 96 on, 32 take 180 there and 226 at 128
    few = D <= 80 and not (joint and D > 64 and capability < (10, 0))  # of two streams 64 queries spill 32 bytes at 72
    return Configuration(64 if few else 32, 64, 4, 2)


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
    """Without prefetch: of four tiles a step it would take 48 bytes a thread more than there are at D = 72. 4 warps spill 128 bytes
    at D = 128 for sm_90; on sm_80, where 8 would repeat work, 64 keys spill 56 at D = 72."""
    if dtype == torch.float32:
        return Configuration(32, 32, 8, 1)
    if capability < (9, 0):
        return Configuration(64, 32, 4, 1)
    return Configuration(64, 64, 8 if D > 96 else 4, 1)


def resident_programs(device: torch.device) -> int:
    """Of attention_backward_short: two blocks of 128 threads fit the registers of a multiprocessor. The interpreter has one."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)
