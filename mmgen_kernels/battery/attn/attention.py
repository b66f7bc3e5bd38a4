"""Cases of attention and of its backward."""

from __future__ import annotations

import torch

from mmgen_kernels.battery.attn.data import (
    BF16,
    FEW,
    FP16,
    FP32,
    FP64,
    LAYOUTS,
    SAME,
    Inputs,
    equal,
    masked_bias,
    padding_of_nan,
    spoiled,
    steep,
)
from mmgen_kernels.battery.attn.law import pair

DIT = Inputs(T=256, S=256, B=2, H=2, G=2)
CROSS = Inputs()
HEAD_DIMS = (8, 24, 64, 72, 80, 88, 96, 128, 256)
LENGTHS = (1, 16, 63, 64, 65, 255, 256, 257, 1024)
KEY_LENGTHS = (51, 0, 7)
OUT_OF_RANGE = (-4, 50, 1000)
# A sequence of one token, one without keys, one without anything, one longer than a tile; two queries at the end are in none.
BOUNDS_Q, BOUNDS_K = (0, 1, 6, 6, 75, 108), (0, 17, 17, 17, 90, 121)
PACKED = Inputs(T=110, S=121, bounds_q=BOUNDS_Q, bounds_k=BOUNDS_K)
BIASES = ("bhts", "hts", "bts", "ts", "bhs")
BIASES_OF_NO_KEY = ("bht", "")  # which change nothing but lse; their gradient is 0 but for roundings, with which nothing compares
WIDE = SAME[:2]  # in 16 bits model code spreads a NaN, and is no bar
MIXED = ((BF16, FP32), (FP16, FP32), (FP32, BF16), (FP64, FP32))


def cover():
    """Every pair of a head dimension, a T and an S, by the Latin square; the rest of the options goes round beside them."""
    for i, D in enumerate(HEAD_DIMS):
        for j, T in enumerate(LENGTHS):
            S = LENGTHS[(i + j) % len(LENGTHS)]
            B = max(2, min(1024 // T, 16384 // S))  # the law for fp32 wants some hundred rows
            inputs = Inputs(T, S, D, B, H=2, G=1 + i % 2)
            dtype = (FP32, BF16, FP16)[(i + 2 * j) % 3]
            yield from pair(f"D{D}_T{T}_S{S}", inputs, ((dtype,),), causal=(i + j) % 4 == 3)


COVER = {case.name for case in cover()}
CASES = [
    *pair("dit", DIT, SAME, quick=True),
    *pair("causal", DIT, FEW, causal=True, quick=True),
    *pair("cross", CROSS, SAME, quick=True),
    *pair("cross_causal", CROSS, SAME, causal=True),
    *pair("more_queries_causal", CROSS.but(T=70, S=20), FEW, causal=True),
    *pair("scale", CROSS, FEW, scale=0.3),
    *[c for g in (1, 2) for c in pair(f"groups_{g}", CROSS.but(G=g), FEW, quick=g == 2)],
    *pair("key_lengths", CROSS.but(key_lengths=KEY_LENGTHS, values=padding_of_nan(KEY_LENGTHS)), SAME, quick=True),
    *pair("key_lengths_causal_int64", CROSS.but(key_lengths=KEY_LENGTHS, G=2, integers=torch.int64), FEW, causal=True),
    *pair("key_lengths_out_of_range", CROSS.but(key_lengths=OUT_OF_RANGE), FEW),
    *pair("packed", PACKED, SAME, quick=True),
    *pair("packed_causal_groups", PACKED.but(G=2), FEW, causal=True),
    *[c for axes in BIASES for c in pair(f"bias_{axes}", CROSS.but(bias=axes), FEW, quick=axes == "hts")],
    *[pair(f"bias_{axes or 'number'}", CROSS.but(bias=axes), FEW)[0] for axes in BIASES_OF_NO_KEY],
    *pair("bias_mixed_dtypes", CROSS.but(bias="hts"), MIXED),
    *pair("bias_causal_key_lengths", CROSS.but(bias="bts", key_lengths=KEY_LENGTHS, G=2), FEW, causal=True),
    *pair("bias_of_minus_infinity", CROSS.but(bias="hts", values=masked_bias), SAME, quick=True),
    *pair("bias_of_minus_infinity_causal", CROSS.but(bias="bhts", values=masked_bias), FEW, causal=True),
    *pair("lse", CROSS.but(bias="ts", key_lengths=KEY_LENGTHS), SAME, uses=("out", "lse")),
    *pair("only_lse", CROSS, FEW, uses=("lse",)),
    *[c for n, change in LAYOUTS.items() for c in pair(n, CROSS.but(layout=change), FEW)],
    *pair("packed_projection", PACKED.but(layout=LAYOUTS["projection"]), FEW),
    pair("steep", CROSS.but(values=steep), SAME[:3], scale=0.125)[0],  # past fp16; the gradients of logits are 0 but for roundings
    *pair("equal", CROSS.but(values=equal, S=64), SAME),
    *[c for v in ("nan", "inf") for c in pair(v, CROSS.but(values=spoiled(float(v))), WIDE)],
    *[c for n in ("B", "T", "S") for c in pair(f"no_{n}", CROSS.but(**{n: 0}), FEW)],
    *pair("many_heads", CROSS.but(B=8193, H=8, G=8, T=1, S=2, D=8), ((BF16,),)),
    *cover(),
]  # fmt: skip
