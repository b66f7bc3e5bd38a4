"""What the kernels of the family share: where a sample's elements lie, noise from a key, and numbers that stay fp64 on the way.

A sample is cut into pieces of BLOCK elements, one for each program. Addresses are 64-bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.philox.triton_kernels import block_of, box_muller
from mmgen_kernels.triton_rounding import narrow, widen

BLOCK = 1024  # 8 elements a thread: 16 bytes of 16-bit elements, and two blocks of the noise's stream
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # the normals' bits count roundings; an FMA is written where one is wanted


class Samples:
    """Tensors as `count` samples of `size` elements side by side: the tensors, and their strides from sample to sample.

    One whose samples are not dense is copied. Where nothing is a sample's own, everything is one long sample.
    """

    def __init__(self, like: Tensor, tensors: Iterable[Tensor | None], by_sample: bool):
        self.tensors = [None if t is None else dense_samples(t) for t in tensors]
        self.count = like.shape[0] if like.dim() else 1
        self.size = like.numel() // max(self.count, 1)
        self.strides = [0 if t is None or t.dim() == 0 else t.stride(0) for t in self.tensors]
        given = [stride for t, stride in zip(self.tensors, self.strides, strict=True) if t is not None]
        if self.count <= 1 or (not by_sample and all(stride == self.size for stride in given)):
            self.count, self.size, self.strides = 1, like.numel(), [0] * len(self.strides)
        # rows that begin at multiples of 8 elements are read 16 bytes at a time; everything else is its own size
        self.aligned = all(n % 8 == 0 for n in (self.size, *self.strides))

    def arguments(self) -> list[Tensor | int | None]:
        return [a for pair in zip(self.tensors, self.strides, strict=True) for a in pair]


def dense_samples(tensor: Tensor) -> Tensor:
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def numbers_of(values: Sequence[float], parts: int) -> tuple[float, ...]:
    """As a kernel is given them: a Python float reaches it as fp32, and three of these hold an fp64."""
    found = []
    for value in values:
        for _ in range(parts):
            found.append(rounded(value))
            value = value - found[-1] if math.isfinite(found[-1]) else 0.0
    return tuple(found)


def rounded(value: float) -> float:
    """To fp32; infinite where that has no such number."""
    return ctypes.c_float(value).value


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# -- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def number(numbers, AT: tl.constexpr, PARTS: tl.constexpr):
    """In fp64 where there are parts that say so, else in fp32."""
    total = tl.full([], 0.0, tl.float32 if PARTS == 1 else tl.float64)
    for part in tl.static_range(PARTS):
        total += numbers[PARTS * AT + part]
    return total


@triton.jit
def real(value, WIDE: tl.constexpr):
    return value.to(tl.float64) if WIDE else value.to(tl.float32)


@triton.jit
def multiple_of_8(value, ALIGNED: tl.constexpr):
    value = value.to(tl.int64)
    return tl.multiple_of(value, 8) if ALIGNED else value


@triton.jit
def places(piece, size, lead, BLOCK: tl.constexpr, LEADS: tl.constexpr):
    """The elements of a piece within their sample, and which of them there are. The first piece begins `lead` before the sample."""
    i = piece * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if LEADS:
        i -= lead
        inside = (i >= 0) & (i < size)
    return i, inside


@triton.jit
def load(pointer, sample, stride, i, inside, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    return widen(tl.load(pointer + sample * multiple_of_8(stride, ALIGNED) + i, mask=inside, other=0.0), WIDE)


@triton.jit
def store(pointer, sample, size, i, inside, values):
    tl.store(pointer + sample * size + i, narrow(values, pointer), mask=inside)


@triton.jit
def key_of(key, sample, PER_SAMPLE: tl.constexpr):
    """Seed and offset."""
    at = key + 2 * sample if PER_SAMPLE else key
    return tl.load(at), tl.load(at + 1)


@triton.jit
def folded(seed, offset, i):
    """The key that fold_in makes."""
    a, b, c, d = block_of(seed, offset + i)
    return a.to(tl.int64) | (b.to(tl.int64) << 32), c.to(tl.int64) | (d.to(tl.int64) << 32)


@triton.jit
def normals(seed, offset, first, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """BLOCK normals of a stream, from its block `first` on."""
    a, b, c, d = block_of(seed, offset + first + tl.arange(0, BLOCK // 4))
    a, b = box_muller(a, b, WIDE)
    c, d = box_muller(c, d, WIDE)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def start_of_stream(sample, size, PER_SAMPLE: tl.constexpr):
    """Which block of its key's stream a sample begins in, and how many elements of that lie before."""
    start = (sample * 0 if PER_SAMPLE else sample) * size
    return start // 4, start % 4


@triton.jit
def add_term(total, factor, term, CHECKED: tl.constexpr):
    """total + factor term. A factor that is 0 has no term, whatever that holds; CHECKED: nobody has looked yet."""
    with_it = tl.fma(tl.zeros_like(term) + factor, term, total)
    return tl.where(factor == 0.0, total, with_it) if CHECKED else with_it
