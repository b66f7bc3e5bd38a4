"""Schedules of betas by name, and the timesteps that a shorter process keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

GREATEST_BETA = 0.999
COSINE = ("cosine", "squaredcos_cap_v2")  # OpenAI's name and DiT's


def get_named_beta_schedule(name: str, num_timesteps: int) -> Tensor:
    """Betas, fp64 (T,).

    linear: from 0.1 / T to 20 / T in equal steps (Ho et al. 2020, 1e-4 to 0.02 for T = 1000). cosine, also called
    squaredcos_cap_v2: so that alphas_cumprod is cos((t + 0.008) / 1.008 pi / 2)^2 over time in [0, 1], each beta at most 0.999
    (Nichol and Dhariwal 2021).

    Raises:
        ValueError: for another name, or less than 2 timesteps.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
    if name == "linear":
        return torch.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps, dtype=torch.float64)
    if name not in COSINE:
        raise ValueError(f"name must be one of linear, {', '.join(COSINE)}, got {name!r}")
    signal = [math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_timesteps + 1)]
    betas = [min(1 - after / before, GREATEST_BETA) for before, after in itertools.pairwise(signal)]
    return torch.tensor(betas, dtype=torch.float64)


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps that a process of fewer steps keeps.

    Args:
        num_timesteps: of the whole process, which is cut into as many sections of about equal length as there are counts.
        section_counts: how many to take of each section, evenly, first and last included: a list, or a string as "10,15,20";
            or "ddimN": N at a whole stride from 0 on (Song et al. 2021).

    Raises:
        ValueError: a section is shorter than its count, or no whole stride takes N.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            wanted = int(section_counts.removeprefix("ddim"))
            strides = (s for s in range(1, num_timesteps) if len(range(0, num_timesteps, s)) == wanted)
            if (whole := next(strides, None)) is None:
                raise ValueError(f"section_counts must be a whole stride of {num_timesteps} timesteps, got {section_counts!r}")
            return set(range(0, num_timesteps, whole))
        section_counts = [int(count) for count in section_counts.split(",")]
    length, longer = divmod(num_timesteps, len(section_counts))
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = length + (i < longer)
        if count > size:
            raise ValueError(f"section_counts must take at most {size} timesteps of section {i}, got {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # added up, as the scripts do, so that places between two timesteps are rounded to the same one
        kept |= {start + round(place) for place in itertools.accumulate([0.0, *[stride] * (count - 1)])} if count else set()
        start += size
    return kept


def spaced_betas(betas: Tensor, use_timesteps: Iterable[int]) -> tuple[Tensor, list[int]]:
    """Betas of the process that has the kept timesteps' alphas_cumprod, and those timesteps in order.

    Raises:
        ValueError: one of them is no timestep, or there are less than 2.
    """
    kept = sorted(set(use_timesteps))
    if len(kept) < 2 or kept[0] < 0 or kept[-1] >= len(betas):
        raise ValueError(f"use_timesteps must be at least 2 of 0 ... {len(betas) - 1}, got {kept[:3]} ... {kept[-1:]}, {len(kept)}")
    alphas_cumprod = (1 - betas).cumprod(0)[kept]
    return 1 - alphas_cumprod / torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1])), kept
