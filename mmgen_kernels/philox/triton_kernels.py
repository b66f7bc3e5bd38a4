"""The noise law in Triton. fp32 normals take the very operations of csrc/philox.h, so that they are the same bits too."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.philox.reference import DIGITS

BLOCKS = 512  # Philox blocks per program, four elements each


@triton.jit
def polynomial_of_log(f):
    p = f * -0.04490960762 + 0.10448331386
    p = p * f + -0.13162232935
    p = p * f + 0.14482061565
    p = p * f + -0.16647766531
    p = p * f + 0.19990606606
    p = p * f + -0.25000053644
    p = p * f + 0.33333453536
    return p * f + -0.5


@triton.jit
def log_uniform(word, WIDE: tl.constexpr):
    """ln u, u = (word + 1/2) / 2^32."""
    above_half = (word >> 31) != 0
    mirrored = tl.where(above_half, ~word, word).to(tl.int32)
    if WIDE:
        distance = (mirrored.to(tl.float64) + 0.5) * (2.0**-32)
        u = tl.where(above_half, 1.0 - distance, distance)
        # ln u = ln(1 - d): the quotient makes up for the rounding of 1 - d
        log_u = tl.where(above_half, tl.log(u) * (distance / tl.where(above_half, 1.0 - u, 1.0)), tl.log(u))
        log_u = tl.where(above_half & (u == 1.0), -distance, log_u)
    else:
        distance = (mirrored.to(tl.float32) + 0.5) * (2.0**-32)
        u = tl.where(above_half, 1.0 - distance, distance)
        above = u.to(tl.int32, bitcast=True) - 0x3F400000
        exponent = above >> 23
        mantissa = ((above & 0x7FFFFF) + 0x3F400000).to(tl.float32, bitcast=True)
        f = tl.where(exponent == 0, -distance, mantissa - 1.0)
        n = exponent.to(tl.float32)
        log_u = n * 0.693359375 + (f + (f * f * polynomial_of_log(f) + n * -2.12194440e-4))
    return log_u


@triton.jit
def box_muller(radius, angle, WIDE: tl.constexpr):
    turned = angle + 0x20000000
    quadrant = turned >> 30
    rest = (turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    log_u = log_uniform(radius, WIDE)
    if WIDE:
        r = tl.sqrt(-2.0 * log_u)
        x = (rest.to(tl.float64) + 0.5) * (2.0**-32)
        x = x * 6.283185307179586
        s = tl.sin(x)
        c = tl.cos(x)
    else:
        r = tl.sqrt_rn(-2.0 * log_u)
        x = (rest * 2 + 1).to(tl.float32) * (2.0**-33)
        t = x * x
        s = x * (((t * -75.393600464 + 81.592353821) * t + -41.341663361) * t + 6.2831854820)
        c = (((t * 59.229244232 + -85.443237305) * t + 64.939323425) * t + -19.739208221) * t + 1.0
    odd = (quadrant & 1) != 0
    first = r * tl.where(odd, s, c)
    second = r * tl.where(odd, c, s)
    return tl.where(((quadrant + 1) & 2) != 0, -first, first), tl.where((quadrant & 2) != 0, -second, second)


@triton.jit
def block_of(seed, counter):
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, low ^ low, low ^ low)


@triton.jit(do_not_specialize=["size", "pieces"])
def stream_kernel(key_ptr, out_ptr, size, pieces, KIND: tl.constexpr, DIGITS: tl.constexpr, BLOCKS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    k = program // pieces
    first = (program % pieces) * BLOCKS
    seed = tl.load(key_ptr + 2 * k)
    offset = tl.load(key_ptr + 2 * k + 1)
    a, b, c, d = block_of(seed, offset + first + tl.arange(0, BLOCKS))
    if KIND == "normal":
        a, b = box_muller(a, b, DIGITS == 32)
        c, d = box_muller(c, d, DIGITS == 32)
    values = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    if KIND == "uniform":
        if DIGITS == 32:
            values = values.to(tl.float64) * (2.0**-32)
        else:
            values = (values >> (32 - DIGITS)).to(tl.int32).to(tl.float32) * (1.0 / (1 << DIGITS))
    i = first * 4 + tl.arange(0, 4 * BLOCKS)
    tl.store(out_ptr + k * size + i, values.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["keys"])
def fold_in_kernel(key_ptr, i_ptr, out_ptr, keys, BLOCKS: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    valid = k < keys
    seed = tl.load(key_ptr + 2 * k, mask=valid, other=0)
    offset = tl.load(key_ptr + 2 * k + 1, mask=valid, other=0)
    a, b, c, d = block_of(seed, offset + tl.load(i_ptr + k, mask=valid, other=0))
    tl.store(out_ptr + 2 * k, a.to(tl.int64) | (b.to(tl.int64) << 32), mask=valid)
    tl.store(out_ptr + 2 * k + 1, c.to(tl.int64) | (d.to(tl.int64) << 32), mask=valid)


def launch(key: Tensor, shape: list[int], dtype: torch.dtype, kind: str, digits: int) -> Tensor:
    out = key.new_empty(shape, dtype=dtype)
    keys = key.numel() // 2
    if out.numel() == 0:
        return out
    size = out.numel() // keys
    pieces = triton.cdiv(size, 4 * BLOCKS)
    with on_device_of(key):
        stream_kernel[(keys * pieces,)](
            key.contiguous(), out, size, pieces, KIND=kind, DIGITS=digits, BLOCKS=BLOCKS, enable_fp_fusion=False
        )
    return out


def philox_integers(key: Tensor, shape: list[int]) -> Tensor:
    return launch(key, shape, torch.int64, "integers", 32)


def philox_uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return launch(key, shape, dtype, "uniform", DIGITS[dtype])


def philox_normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return launch(key, shape, dtype, "normal", DIGITS[dtype])


def fold_in(key: Tensor, i: Tensor) -> Tensor:
    out = torch.empty(key.shape, dtype=torch.int64, device=key.device)
    if i.numel() == 0:
        return out
    with on_device_of(key):
        fold_in_kernel[(triton.cdiv(i.numel(), BLOCKS),)](
            key.contiguous(), i.contiguous(), out, i.numel(), BLOCKS=BLOCKS, enable_fp_fusion=False
        )
    return out


def on_device_of(key: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(key.device) if key.is_cuda else contextlib.nullcontext()
