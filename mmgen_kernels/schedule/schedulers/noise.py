"""The noise of a step: drawn as diffusers draws it, or a key in its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
NOISES = ("torch", "philox")


def randn(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normals with the bits of diffusers' `randn_tensor`: drawn where the generator lives, sample by sample from a list of them.

    Raises:
        ValueError: for a generator of another accelerator, or a list that has not one for each sample.
    """
    generator = one_of(generator)
    if generator is None or isinstance(generator, torch.Generator):
        where = place_of(generator, device)
        return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator must be one, or one for each of {shape[0]} samples, got {len(generator)}")
    one = (1, *shape[1:])
    drawn = [torch.randn(one, generator=g, device=place_of(generator[0], device), dtype=dtype) for g in generator]
    return torch.cat(drawn).to(device)


def one_of(generator: Generators) -> Generators:
    """A list of one is that one, as in diffusers."""
    return generator[0] if isinstance(generator, Sequence) and len(generator) == 1 else generator


def place_of(generator: torch.Generator | None, device: torch.device) -> torch.device:
    if generator is None or generator.device.type == device.type:
        return device
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on {device} or on the CPU, got {generator.device}")
    return generator.device


def key_from(generator: Generators, device: torch.device) -> Tensor:
    """A key, (2,), or from a list of generators one for each sample, (B, 2)."""
    generator = one_of(generator)
    if generator is None or isinstance(generator, torch.Generator):
        where = place_of(generator, device)
        key = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=where)
    else:
        where = place_of(generator[0], device)
        key = torch.stack([torch.randint(-(2**63), 2**63 - 1, (2,), generator=g, device=where) for g in generator])
    return key.to(device, non_blocking=True)
