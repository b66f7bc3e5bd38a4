"""Cases of gate_residual_adaln and of its backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mmgen_kernels.battery.modulation.data import (
    BF16,
    FEW,
    FP32,
    LAYOUTS,
    MIXED,
    SAME,
    chunks,
    constant,
    huge,
    inputs,
    not_finite,
    not_finite_y,
    offset,
    tiny,
)
from mmgen_kernels.battery.modulation.law import pair

NAMES = "y gate shift scale"
EVERY = "y gate shift scale shift_2 scale_2 weight bias post_weight table"
seam = partial(pair, "gate_residual_adaln")
NARROW = SAME[1:]
LUMINA: dict[str, Any] = {"gate_fn": "tanh", "post_norm": "rms", "norm": "rms"}
ADDRESSES = ("rows", "sample shared token frame", "shared rows")
SHAPES = ((65, 1, 72), (3, 256, 72), (3, 255, 384), (17, 3, 1152), (193, 72), (3, 4, 15, 72))
FEW_CHANNELS = ((3, 257, 3), (3, 257, 1))
EMPTY = {"no_samples": (0, 12, 72), "no_tokens": (3, 0, 72)}
USES = {"residual": ("residual",), "second": ("modulated_2",), "outer": ("residual", "modulated_2")}

CASES = [
    *seam("dit", inputs(NAMES), SAME, quick=True),
    *seam("lumina", inputs("y gate scale weight post_weight"), SAME, **LUMINA, quick=True),
    *seam("every", inputs(EVERY), SAME, post_norm="layer", gate_fn="sigmoid_one_minus", quick=True),
    *seam("every_rms", inputs(EVERY), SAME, **LUMINA),
    *seam("ungated", inputs("y shift scale table"), SAME),
    *seam("wan", inputs(NAMES + " table"), (MIXED[0],)),
    *seam("unmodulated", inputs("y gate weight bias"), SAME[:2]),
    *[c for a in ADDRESSES for c in seam(f"by_{a.replace(' ', '_')}", inputs(EVERY, address=a), NARROW, **LUMINA)],
    *seam("by_int64_rows", inputs(NAMES, address="rows", index=torch.int64), NARROW),
    *seam("mixed_dtypes", inputs(EVERY), MIXED, **LUMINA),
    *seam("into_bfloat16", inputs(NAMES), ((FP32, BF16, BF16),), dtype=BF16),
    *[c for s in SHAPES for c in seam("x".join(map(str, s)), inputs(NAMES, s), FEW)],
    *[c for s in FEW_CHANNELS for c in seam(f"{s[-1]}_channels", inputs(NAMES, s), SAME[:2], eps=0.5)],
    *[c for n, s in EMPTY.items() for c in seam(n, inputs(EVERY, s), FEW, **LUMINA)],
    *[c for n, change in LAYOUTS.items() for c in seam(n, inputs(EVERY, address="sample token", layout=change), FEW, **LUMINA)],
    *seam("chunk_9", inputs(NAMES, layout=chunks(9)), FEW),
    # In 16 bits such a residual has lost in its rounding, which plain PyTorch shares, what the norm then enlarges.
    *[c for v in (offset, constant, tiny) for c in seam(v.__name__, inputs(NAMES, values=v), SAME[1:2])],
    *seam("huge", inputs(NAMES, values=huge), NARROW),
    *seam("nan", inputs(EVERY, values=not_finite(torch.nan)), FEW, post_norm="layer"),
    *seam("inf_rms", inputs(EVERY, values=not_finite(torch.inf)), FEW, **LUMINA),
    *seam("not_finite_y", inputs(NAMES, values=not_finite_y), FEW),
    *[c for n, uses in USES.items() for c in seam(f"only_{n}", inputs(EVERY), FEW, uses=uses, **LUMINA)],
]  # fmt: skip
