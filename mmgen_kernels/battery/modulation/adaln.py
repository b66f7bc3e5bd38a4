"""Cases of adaln and of its backward."""

from __future__ import annotations

from functools import partial

import torch

from mmgen_kernels.battery.modulation.data import (
    BF16,
    FEW,
    FP16,
    FP32,
    FP64,
    LAYOUTS,
    MIXED,
    SAME,
    chunks,
    chunks_of_tokens,
    constant,
    gaussian,
    huge,
    inputs,
    not_finite,
    offset,
    tiny,
    zeros,
)
from mmgen_kernels.battery.modulation.law import pair

NORMS = ("layer", "rms")
DIT = "shift scale"
EVERY = "shift scale shift_2 scale_2 weight bias table"
adaln = partial(pair, "adaln")
NARROW = SAME[1:]

# What is left out of the formula. With nothing to multiply or add, plain PyTorch rounds once in 16 bits, as we do.
PRESENCE = ("", "scale", "shift", "weight bias", "shift scale weight bias", "scale weight", "shift scale shift_2 scale_2")
WIDE = (SAME[0], SAME[1])
ADDRESSES = ("shared", "sample", "frame", "token", "rows", "shared token frame sample", "rows shared")
# x of other ranks, D off every vector's width, T next to every tile's edge
SHAPES = ((3, 1, 1152), (3, 255, 72), (3, 256, 3), (4, 257, 384), (3, 2, 1408), (7, 72), (3, 2, 4, 72))
EMPTY = {"no_samples": (0, 12, 72), "no_tokens": (3, 0, 72)}

CASES = [
    *[c for norm in NORMS for c in adaln(f"dit_{norm}", inputs(DIT), SAME, norm=norm, quick=True)],
    *[c for norm in NORMS for c in adaln(f"every_{norm}", inputs(EVERY), SAME, norm=norm)],
    *[c for n in PRESENCE for k in NORMS for c in adaln(f"{k}_of_{n.replace(' ', '_')}", inputs(n), WIDE, norm=k)],
    *[c for a in ADDRESSES for c in adaln(f"by_{a.replace(' ', '_')}", inputs(EVERY, address=a), NARROW, norm="rms")],
    *adaln("by_int64_rows", inputs(DIT, address="rows", index=torch.int64), SAME, quick=True),
    *adaln("mixed_dtypes", inputs(EVERY), MIXED, quick=True),
    *adaln("mixed_dtypes_by_rows", inputs(EVERY, address="rows"), MIXED, norm="rms"),
    *[c for d in (FP32, FP16) for c in adaln(f"into_{d}".replace("torch.", ""), inputs(DIT), ((BF16,), (FP32,)), dtype=d)],
    *[c for s in SHAPES for c in adaln("x".join(map(str, s)), inputs(DIT, s), FEW)],
    *[c for n in NORMS for c in adaln(f"one_channel_{n}", inputs(DIT, (3, 257, 1)), SAME[:2], norm=n, eps=0.5)],
    *[c for n, s in EMPTY.items() for c in adaln(n, inputs(EVERY, s), FEW)],
    *[c for n, s in EMPTY.items() for c in adaln(f"{n}_by_frame", inputs(EVERY, s, "frame"), FEW)],
    *[c for n, s in EMPTY.items() for c in adaln(f"{n}_by_rows", inputs(EVERY, s, "rows"), FEW)],
    *[c for n, change in LAYOUTS.items() for c in adaln(n, inputs(EVERY, address="sample token", layout=change), FEW)],
    *[c for n in (6, 9) for c in adaln(f"chunk_{n}", inputs(DIT, layout=chunks(n)), FEW, quick=n == 6)],
    *adaln("chunks_of_tokens", inputs(DIT, address="token", layout=chunks_of_tokens), FEW),
    *[c for v in (offset, constant) for n in NORMS for c in adaln(f"{v.__name__}_{n}", inputs(DIT, values=v), NARROW, norm=n)],
    *[c for v in (zeros, tiny, huge) for n in NORMS for c in adaln(f"{v.__name__}_{n}", inputs(DIT, values=v), NARROW, norm=n)],
    *[c for n in NORMS for c in adaln(f"nan_{n}", inputs(EVERY, values=not_finite(torch.nan)), FEW, norm=n)],
    *[c for n in NORMS for c in adaln(f"inf_{n}", inputs(EVERY, values=not_finite(torch.inf)), FEW, norm=n)],
    *adaln("only_second", inputs(EVERY, values=gaussian), FEW, uses=("modulated_2",)),
]  # fmt: skip
