"""Cases of adaln and of its backward."""

from __future__ import annotations

from functools import partial

import torch

from mmgen_kernels.battery.modulation.data import (
    BF16,
    FEW,
    FP16,
    FP32,
    LAYOUTS,
    MIXED,
    SAME,
    chunks,
    chunks_of_tokens,
    constant,
    huge,
    inputs,
    not_finite,
    offset,
    tiny,
)
from mmgen_kernels.battery.modulation.law import pair
from mmgen_kernels.checks import NORMS

DIT = "shift scale"
EVERY = "shift scale shift_2 scale_2 weight bias table"
adaln = partial(pair, "adaln")
WIDE, NARROW = SAME[:2], SAME[1:]
# What is left out of the formula. With nothing to multiply, plain PyTorch rounds once in 16 bits, as we do: no bar.
PRESENCE = {"": "layer", "scale": "rms", "shift": "layer", "scale weight": "layer", "shift scale bias": "rms"}
ADDRESSES = ("frame", "token", "rows", "shared token frame sample", "rows shared")
# x of other ranks, D off every vector's width, T next to every tile's edge. The law for fp32 wants some hundred rows: the maximum
# over few hangs on the luck of one.
SHAPES = ((65, 1, 72), (3, 255, 72), (4, 257, 384), (3, 30, 1152), (17, 2, 1408), (193, 72), (3, 4, 15, 72))
# Of few channels some rows have next to no variance, and the gradient of one channel next to nothing left: eps keeps them apart.
FEW_CHANNELS = {(3, 256, 3): "layer", (3, 257, 1): "rms"}
EMPTY = {"no_samples": ((0, 12, 72), "frame"), "no_tokens": ((3, 0, 72), "rows")}

CASES = [
    *[c for n in NORMS for c in adaln(f"dit_{n}", inputs(DIT), SAME, norm=n, quick=True)],
    *[c for n in NORMS for c in adaln(f"every_{n}", inputs(EVERY), SAME, norm=n)],
    *[c for names, n in PRESENCE.items() for c in adaln(f"{n} {names}".strip().replace(" ", "_"), inputs(names), WIDE, norm=n)],
    *[c for a in ADDRESSES for c in adaln(f"by_{a}".replace(" ", "_"), inputs(EVERY, address=a), NARROW, norm="rms")],
    *adaln("by_int64_rows", inputs(DIT, address="rows", index=torch.int64), SAME, quick=True),
    *adaln("mixed_dtypes", inputs(EVERY), MIXED, quick=True),
    *adaln("mixed_dtypes_by_rows", inputs(EVERY, address="rows"), MIXED, norm="rms"),
    *adaln("into_float32", inputs(DIT), ((BF16,), (FP16,)), dtype=FP32),
    *adaln("into_bfloat16", inputs(DIT), ((FP16,), (FP32, FP32, BF16)), dtype=BF16),
    *[c for s in SHAPES for c in adaln("x".join(map(str, s)), inputs(DIT, s), FEW)],
    *[c for s, n in FEW_CHANNELS.items() for c in adaln(f"{s[-1]}_channels", inputs(DIT, s), WIDE, norm=n, eps=0.5)],
    *[c for n, (s, a) in EMPTY.items() for c in adaln(n, inputs(EVERY, s, a), FEW)],
    *[c for n, change in LAYOUTS.items() for c in adaln(n, inputs(EVERY, address="sample token", layout=change), FEW)],
    *[c for n in (6, 9) for c in adaln(f"chunk_{n}", inputs(DIT, layout=chunks(n)), FEW, quick=n == 6)],
    *adaln("chunks_of_tokens", inputs(DIT, address="token", layout=chunks_of_tokens), FEW),
    *[c for v in (offset, constant) for n in NORMS for c in adaln(f"{v.__name__}_{n}", inputs(DIT, values=v), NARROW, norm=n)],
    *[c for v in (tiny, huge) for c in adaln(v.__name__, inputs(DIT, values=v), NARROW)],
    *adaln("huge_rms", inputs(DIT, values=huge), NARROW, norm="rms"),
    *[c for n in NORMS for c in adaln(f"nan_{n}", inputs(EVERY, values=not_finite(torch.nan)), FEW, norm=n)],
    *[c for n in NORMS for c in adaln(f"inf_{n}", inputs(EVERY, values=not_finite(torch.inf)), FEW, norm=n)],
    *adaln("only_second", inputs(EVERY), FEW, uses=("modulated_2",)),
]  # fmt: skip
