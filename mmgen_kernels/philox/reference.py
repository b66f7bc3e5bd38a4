"""The noise law in plain PyTorch: 32-bit words in int64 tensors, normals in fp64 with one final rounding.

Shapes: key (*batch, 2), result (*batch, ...). Words of 64 bits wrap around as int64 does, whose bits are those of uint64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
DIGITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # of a uniform; fp64: all there are


def philox_integers(key: Tensor, shape: list[int]) -> Tensor:
    """Element i of a sample is word i % 4 of block offset + i // 4."""
    count = math.prod(shape[key.dim() - 1 :])
    return words(key, (count + 3) // 4).flatten(-2)[..., :count].reshape(shape)


def philox_uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    digits = DIGITS[dtype]
    return ((philox_integers(key, shape) >> (32 - digits)).double() * 2.0**-digits).to(dtype)


def philox_normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape[key.dim() - 1 :])
    block = words(key, (count + 3) // 4)  # (*batch, blocks, 4)
    pairs = box_muller(block[..., 0::2], block[..., 1::2])  # twice (*batch, blocks, 2)
    return torch.stack(pairs, -1).flatten(-3)[..., :count].reshape(shape).to(dtype)


def philox_exponential(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """-ln u, u = (word + 1/2) / 2^32, of each element: standard exponentials, from 2^-33 to 22.9."""
    return -log_uniform(philox_integers(key, shape)).to(dtype)


def fold_in(key: Tensor, i: Tensor) -> Tensor:
    w = words(torch.stack((key[..., 0], key[..., 1] + i), -1), 1)[..., 0, :]  # (*batch, 4)
    return torch.stack((w[..., 0] | (w[..., 1] << 32), w[..., 2] | (w[..., 3] << 32)), -1)


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """R cos(2 pi v), R sin(2 pi v) with R = sqrt(-2 ln u), u = (radius + 1/2) / 2^32, v = (angle + 1/2) / 2^32, in fp64."""
    r = (-2 * log_uniform(radius)).sqrt()
    # 2 pi v is `quadrant` right angles and x in [-pi/4, pi/4)
    turned = angle + 2**29
    quadrant = (turned >> 30) & 3
    x = (((turned & (2**30 - 1)) - 2**29).double() + 0.5) * (2 * math.pi / 2**32)
    sine, cosine = x.sin(), x.cos()
    odd = quadrant % 2 == 1
    first = torch.where(odd, sine, cosine) * torch.where((quadrant == 1) | (quadrant == 2), -r, r)
    second = torch.where(odd, cosine, sine) * torch.where(quadrant >= 2, -r, r)
    return first, second


def log_uniform(word: Tensor) -> Tensor:
    """ln u with u = (word + 1/2) / 2^32, in fp64."""
    # from the distance to 1 where u is near 1
    near_one = torch.log1p(((LOW - word).double() + 0.5) * -(2.0**-32))
    return torch.where(word >= 2**31, near_one, torch.log((word.double() + 0.5) * 2.0**-32))


def words(key: Tensor, blocks: int) -> Tensor:
    """The first `blocks` blocks of each key's stream. (*batch, 2) -> (*batch, blocks, 4), values in [0, 2^32)"""
    seed, offset = key[..., :1], key[..., 1:]  # (*batch, 1)
    counter = offset + torch.arange(blocks, device=key.device)  # (*batch, blocks)
    zero = torch.zeros_like(counter)
    return torch.stack(rounds((counter & LOW, (counter >> 32) & LOW, zero, zero), (seed & LOW, (seed >> 32) & LOW)), -1)


def rounds(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 on the four 32-bit words of a counter and the two of a key."""
    x, y, z, w = counter
    for _ in range(ROUNDS):
        p, q = x * MULTIPLIERS[0], z * MULTIPLIERS[1]
        x, y, z, w = ((q >> 32) & LOW) ^ y ^ key[0], q & LOW, ((p >> 32) & LOW) ^ w ^ key[1], p & LOW
        key = tuple((k + step) & LOW for k, step in zip(key, WEYL, strict=True))
    return x, y, z, w
