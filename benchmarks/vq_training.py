"""What trains a codebook, beyond the lookup that `vq` races: the drop-in, residual levels, entropy regularisers."""

from __future__ import annotations

import torch

from benchmarks.bars import Bar
from benchmarks.harness import Case
from benchmarks.vq_dropin import dropin_bars, dropin_cases
from benchmarks.vq_entropy import entropy_bars, entropy_cases
from benchmarks.vq_residual import residual_bars, residual_cases

QUICK = ("drop-in/4096x16384x8", "residual/4800x1024x128x8", "entropy/1024x65536x64")


def cases(device: torch.device) -> list[Case]:
    return [*dropin_cases(device), *residual_cases(device), *entropy_cases(device)]


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises; `results` maps case names to their records."""
    return [*dropin_bars(results), *residual_bars(results), *entropy_bars(results)]
