"""How the forward gets its tiles: by their addresses, by tensor descriptors, or by warps that do nothing else.

A descriptor of (B, H, T, D) tells the copy engine of sm_90 and newer where a tile is: no thread computes its address or keeps it
in registers, and tiles end at D = 72 without a mask. They are made on the host and passed by value, so that no kernel needs scratch
for them and a CUDA graph keeps them. All ways give the same bits.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmgen_kernels import backends
from mmgen_kernels.attn.triton_kernels.tiles import VECTOR, strides_of

Tiles = tuple[tuple[int, int], ...]
MOST_TILES = 2  # descriptors of a tensor, each an argument of its own: Triton 3.6 launches none in tuples. 72 has two, 104 three
LARGEST_STRIDE = 2**40  # bytes, and no stride is so large
NO_BOXES = (None,) * (3 * MOST_TILES)

_refusals: dict[tuple[Any, ...], str] = {}  # what the compiler says against specialised warps, if anything
_told: set[str] = set()


def reason_against_descriptors(q: Tensor, k: Tensor, v: Tensor, head: dict[str, Any], capability: tuple[int, int]) -> str:
    """Empty if they serve."""
    if capability < (9, 0):
        return "the chip does not copy tiles by descriptors"
    if q.dtype.itemsize != 2:
        return f"{q.dtype} is multiplied from registers"
    if len(head["IN"]) > MOST_TILES or len(head["OUT"]) > MOST_TILES:
        return f"a head of {head['D']} has more than {MOST_TILES} tiles"
    for tensor in (q, k, v):
        for size, stride in zip(tensor.shape, strides_of(tensor), strict=False):
            # 0 repeats a row or a head; whether the driver takes that, no document says
            if size > 1 and (stride % VECTOR or not 0 < stride < LARGEST_STRIDE // 2):
                return f"strides {tensor.stride()} are no multiples of 16 bytes, or 0"
        if tensor.numel() == 0 or tensor.data_ptr() % 16:
            return "a tensor is empty or does not begin at a multiple of 16 bytes"
    return ""


def reason_against_specialization(
    bias: Tensor | None, key_lengths: Tensor | None, cu_seqlens: Tensor | None, capability: tuple[int, int]
) -> str:
    """Of calls that could have descriptors. Triton 3.6 and 3.9 fail on a second loop, and specialise nothing for sm_90 where a
    branch multiplies after the loop: so one loop has all keys and masks each step, and keys must end where their tensor does."""
    if capability[0] not in (9, 10):
        return "Triton has a pass for sm_90 and one for sm_100"
    if bias is not None:
        return "Triton's pass fails on loads of a bias"
    if key_lengths is not None or cu_seqlens is not None:
        return "a descriptor ends with its tensor, not with its sequence"
    return ""


def boxes_of(tensor: Tensor, tiles: Tiles, rows: int) -> tuple[Any, ...]:
    """Descriptors of tiles in blocks (1, 1, rows, width) of the tensor as (B, H, T, D), or None where there are no more tiles. What
    is alone in its dimension has no next: any stride will do."""
    B, T, H, D = tensor.shape
    b, t, h = (stride or D for stride in strides_of(tensor))
    boxes = [TensorDescriptor(tensor, [B, H, T, D], [b, h, t, 1], [1, 1, rows, width]) for _, width in tiles]
    return *boxes, *[None] * (MOST_TILES - len(boxes))


def refuses(kernel: Any, grid: tuple[int], device: torch.device, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether the compiler gives up on the kernel; asked once of each kind of kernel, and the reason is told."""
    kind = device, arguments[0].dtype, *options.values()
    if kind not in _refusals:
        try:
            kernel.warmup(*arguments, grid=grid, **options)
            _refusals[kind] = ""
        except (RuntimeError, triton.TritonError) as error:  # a pass that fails, too many registers, too much shared memory
            _refusals[kind] = f"Triton {triton.__version__} does not compile it: {str(error).splitlines()[0]}"
    tell(_refusals[kind])
    return bool(_refusals[kind])


def tell(reason: str) -> None:
    """Once, why warps are not specialised."""
    if reason and reason not in _told:
        _told.add(reason)
        warnings.warn(f"mmgen_kernels.attention: warps are not specialised: {reason}", stacklevel=2)


def way_of(
    q: Tensor, k: Tensor, v: Tensor, head: dict[str, Any], capability: tuple[int, int],
    bias: Tensor | None, key_lengths: Tensor | None, cu_seqlens: Tensor | None,
) -> str:  # fmt: skip
    """One of backends.TRITON_ATTENTIONS: what was asked for, or the next best that serves."""
    asked = backends.triton_attention
    if asked == "pointers":
        return asked
    reason = reason_against_descriptors(q, k, v, head, capability)
    way = "pointers" if reason else "descriptors"
    if asked == "warp_specialized":
        reason = reason or reason_against_specialization(bias, key_lengths, cu_seqlens, capability)
        tell(reason)
        way = way if reason else asked
    return way
