"""Cases of gate_residual and of its backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mmgen_kernels.battery.modulation.data import (
    FEW,
    LAYOUTS,
    MIXED,
    SAME,
    chunks,
    constant,
    huge,
    inputs,
    not_finite_y,
    offset,
    tiny,
)
from mmgen_kernels.battery.modulation.law import GATES, pair

GATED = "y gate"
SANDWICH = "y gate post_weight table"
gate_residual = partial(pair, "gate_residual")
NARROW = SAME[1:]
ADDRESSES = ("shared", "frame", "token", "rows")
EMPTY = {"no_samples": (0, 12, 72), "no_tokens": (3, 0, 72)}
FLAT = ("channels_first", "slices", "unaligned")
SHAPES = ((3, 257, 1), (3, 255, 1408), (193, 72))
SANDWICHES = {"identity": "layer", "tanh": "rms", "sigmoid_one_minus": "layer"}
LUMINA: dict[str, Any] = {"gate_fn": "tanh", "post_norm": "rms"}

CASES = [
    *[c for g in GATES for c in gate_residual(g, inputs(GATED), SAME, gate_fn=g, quick=g == "identity")],
    *[c for g, n in SANDWICHES.items() for c in gate_residual(f"{g}_{n}", inputs(SANDWICH), SAME, gate_fn=g, post_norm=n)],
    *gate_residual("lumina", inputs(GATED), SAME, **LUMINA, quick=True),
    *gate_residual("ungated", inputs("y"), SAME),
    *gate_residual("ungated_post_norm", inputs("y post_weight"), SAME[:2], post_norm="layer"),
    *[c for a in ADDRESSES for c in gate_residual(f"by_{a}", inputs(SANDWICH, address=a), NARROW, **LUMINA)],
    *gate_residual("by_int64_rows", inputs(GATED, address="rows", index=torch.int64), NARROW),
    *gate_residual("mixed_dtypes", inputs(GATED), MIXED),
    *gate_residual("mixed_dtypes_post_norm", inputs(SANDWICH, address="token"), MIXED, **LUMINA),
    *[c for s in SHAPES for c in gate_residual("x".join(map(str, s)), inputs(GATED, s), FEW)],
    *[c for n, s in EMPTY.items() for c in gate_residual(n, inputs(SANDWICH, s), FEW, **LUMINA)],
    *[c for n in FLAT for c in gate_residual(n, inputs(SANDWICH, layout=LAYOUTS[n]), FEW, **LUMINA)],
    *gate_residual("chunk_6", inputs(GATED, layout=chunks(6)), FEW),
    *[c for v in (tiny, huge) for c in gate_residual(v.__name__, inputs(GATED, values=v), NARROW)],
    *[c for v in (offset, constant) for c in gate_residual(v.__name__, inputs(SANDWICH, values=v), NARROW, post_norm="layer")],
    *gate_residual("not_finite", inputs(GATED, values=not_finite_y), FEW),
    *gate_residual("not_finite_post_norm", inputs(SANDWICH, values=not_finite_y), FEW, post_norm="layer"),
]  # fmt: skip
