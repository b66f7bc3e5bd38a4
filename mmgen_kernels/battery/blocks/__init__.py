"""Cases of the family."""

from __future__ import annotations

import torch

from mmgen_kernels.battery.blocks.law import OF_QK, VECTORS, Inputs, pair
from mmgen_kernels.blocks.activation import FUSED

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SAME = ((FP64,), (FP32,), (BF16,), (FP16,))
FEW = ((FP32,), (BF16,))
MIXED = ((FP32, BF16, BF16), (FP16, FP32, FP32))  # of x, of vectors, of projections
# There model code rounds where the block does and nowhere else: of gradients either may be the nearer one. Without vectors so of
# results in 16 bits, which are left out there.
AS_UNDER_AUTOCAST = ((FP32, FP32, BF16), (BF16, FP32, BF16))
DIT = Inputs()
NORMED = DIT.but(head_dim=64, qk_affine=OF_QK[:2])  # of few channels some have next to no square, and then large errors
TURNED = DIT.but(head_dim=64, qk_affine=OF_QK, pairs=24, angles=(3,))
BLOCKS = ("adaln_attention", "adaln_mlp", "dit_block")

CASES = [
    *[c for o in BLOCKS for c in pair(o, "dit", DIT, SAME, quick=True)],
    *[c for o in BLOCKS for c in pair(o, "mixed_dtypes", DIT, MIXED)],
    *[pair(o, "as_under_autocast", DIT, AS_UNDER_AUTOCAST)[0] for o in BLOCKS],
    *[c for o in BLOCKS for c in pair(o, "rms_affine", DIT.but(affine=("weight",)), FEW, norm="rms", eps=1e-5)],
    *[c for o in BLOCKS for c in pair(o, "layer_affine", DIT.but(affine=("weight", "bias")), FEW)],
    *[c for o in BLOCKS for c in pair(o, "shared_vectors", DIT.but(vectors=()), FEW)],
    *[c for o in BLOCKS for c in pair(o, "frames", DIT.but(T=66, vectors=(3, 6)), FEW)],
    *[c for o in BLOCKS for c in pair(o, "tokens", DIT.but(vectors=(3, 65)), FEW)],
    *[c for o in BLOCKS for c in pair(o, "rows", DIT.but(rows=5), FEW)],
    *[c for o in BLOCKS[:2] for c in pair(o, "without_vectors", DIT.but(without=VECTORS), ((FP64,), (FP32,)))],
    *pair("dit_block", "without_gates", DIT.but(without=("gate_msa", "gate_mlp")), FEW),
    *pair("dit_block", "scales_alone", DIT.but(without=("shift_msa", "shift_mlp")), FEW),  # Lumina's
    *pair("dit_block", "without_biases", DIT.but(without=("qkv_bias", "proj_bias", "fc1_bias", "fc2_bias")), SAME[1:]),
    *[c for o in BLOCKS[::2] for c in pair(o, "key_lengths", DIT.but(integers={"key_lengths": (65, 7, 40)}), FEW)],
    *[c for o in BLOCKS[::2] for c in pair(o, "packed", DIT.but(B=1, T=110, integers={"cu_seqlens": (0, 30, 31, 110)}), FEW)],
    *[c for o in BLOCKS[::2] for c in pair(o, "qk_norm", NORMED, FEW, qk_norm="rms")],
    *[c for o in BLOCKS[::2] for c in pair(o, "rope", DIT.but(pairs=12), FEW)],
    *[c for o in BLOCKS[::2] for c in pair(o, "qk_layer_norm_rope", TURNED, SAME, qk_norm="layer", interleaved=True)],
    *pair("adaln_attention", "head_dim_72", DIT.but(head_dim=72), SAME[1:], attention_scale=0.1),
    *[c for o in BLOCKS[1:] for a in ("gelu", "swiglu") for c in pair(o, a, DIT.but(ratio=8 / 3), SAME[1:], activation=a)],
    *[c for a in FUSED for c in pair("mlp_activation", a, DIT, SAME, quick=True, activation=a)],
    *[c for a in FUSED for c in pair("mlp_activation", f"{a}_odd", DIT.but(T=1, ratio=1 / 16), FEW, activation=a)],
    *[c for o in BLOCKS[1:] for c in pair(o, "one_token", DIT.but(T=1, B=33), FEW)],
    *pair("mlp_activation", "one_token", DIT.but(T=1, B=33), FEW, activation="gelu_tanh"),
    *pair("adaln_attention", "one_token", DIT.but(T=1, B=33), FEW),
]  # fmt: skip
