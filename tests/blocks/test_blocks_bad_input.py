"""Bad input raises a clear error that names the argument; values never raise."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery.blocks.law import call

B, T, D, H, M = 2, 6, 16, 2, 24


def good(operator):
    t = {"x": torch.randn(B, T, D)}
    halves = ("msa", "mlp") if operator == "dit_block" else ("",)
    t |= {f"{v}_{half}".rstrip("_"): torch.randn(B, D) for half in halves for v in ("shift", "scale", "gate")}
    attention = {"qkv_weight": (3 * D, D), "qkv_bias": (3 * D,), "proj_weight": (D, D), "proj_bias": (D,)}
    mlp = {"fc1_weight": (M, D), "fc1_bias": (M,), "fc2_weight": (D, M), "fc2_bias": (D,)}
    shapes = {"adaln_attention": attention, "adaln_mlp": mlp, "dit_block": attention | mlp}[operator]
    t |= {n: torch.randn(s) for n, s in shapes.items()}
    return t, {} if operator == "adaln_mlp" else {"num_heads": H}


OPTIONS = ("norm", "eps", "num_heads", "activation", "attention_scale", "qk_norm", "qk_eps")
ALL, ATTENTION, MLP = ("adaln_attention", "adaln_mlp", "dit_block"), ("adaln_attention", "dit_block"), ("adaln_mlp", "dit_block")
BAD = [
    (ALL, {"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    (ALL, {"x": torch.zeros(B, T, D).int()}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int32"),
    (ALL, {"x": torch.zeros(T, D)}, ValueError, r"x must be \(B, T, D\) with D >= 1, got shape \(6, 16\)"),
    (("adaln_mlp",), {"shift": torch.zeros(B, D + 1)}, ValueError, r"shift must be \(16,\), \(2, 16\) or .* got shape \(2, 17\)"),
    (("adaln_mlp",), {"scale": torch.zeros(B, 4, D)}, ValueError, r"F divides T = 6, got shape \(2, 4, 16\)"),
    (("adaln_mlp",), {"gate": torch.zeros(1, D)}, ValueError, r"gate must be \(16,\), \(2, 16\)"),
    (("dit_block",), {"gate_mlp": "no"}, TypeError, "gate_mlp must be a tensor, got str"),
    (ALL, {"rows": torch.zeros(B, T)}, TypeError, "rows must be int32 or int64, got torch.float32"),
    (ALL, {"rows": torch.zeros(B, 5).int()}, ValueError, r"rows must have x's leading shape \(2, 6\), got \(2, 5\)"),
    (("adaln_mlp",), {"rows": torch.zeros(B, T).int(), "shift": torch.zeros(B, 2, D)}, ValueError, r"shift must be \(R, 16\) or"),
    (ALL, {"norm": "batch"}, ValueError, "norm must be one of layer, rms, got 'batch'"),
    (ALL, {"eps": -1.0}, ValueError, "eps must be at least 0 and finite, got -1.0"),
    (("adaln_mlp",), {"weight": torch.ones(3)}, ValueError, r"weight must be \(16,\), got shape \(3,\)"),
    (("dit_block",), {"norm2_bias": torch.ones(3)}, ValueError, r"norm2_bias must be \(16,\), got shape \(3,\)"),
    (ATTENTION, {"num_heads": 3}, ValueError, r"num_heads must split the rows of qkv_weight \(48, 16\) .* got 3"),
    (ATTENTION, {"num_heads": 0}, ValueError, "got 0"),
    (ATTENTION, {"num_heads": 2.0}, TypeError, "num_heads must be an int, got float"),
    (ATTENTION, {"qkv_weight": torch.zeros(48, 15)}, ValueError, r"qkv_weight must be \(48, 16\), got shape \(48, 15\)"),
    (ATTENTION, {"qkv_bias": torch.zeros(47)}, ValueError, r"qkv_bias must be \(48,\), got shape \(47,\)"),
    (ATTENTION, {"proj_weight": torch.zeros(16, 17)}, ValueError, r"proj_weight must be \(16, 16\), got shape \(16, 17\)"),
    (ATTENTION, {"proj_weight": torch.zeros(16, 16).half()}, TypeError, "proj_weight must have the other projections' dtype"),
    (ATTENTION, {"proj_bias": None, "proj_weight": None}, TypeError, "proj_weight must be a tensor, got NoneType"),
    (ATTENTION, {"key_lengths": torch.zeros(3).int()}, ValueError, r"key_lengths must be \(2,\)"),
    (ATTENTION, {"key_lengths": torch.zeros(2)}, TypeError, "key_lengths must be int32 or int64, got torch.float32"),
    (ATTENTION, {"cu_seqlens": torch.zeros(2).int()}, ValueError, r"x must be \(1, N, D\) with cu_seqlens"),
    (ATTENTION, {"cu_seqlens": torch.zeros(2, 2).int()}, ValueError, r"cu_seqlens must be \(C \+ 1,\)"),
    (ATTENTION, {"attention_scale": "big"}, TypeError, "attention_scale must be a number, got str"),
    (ATTENTION, {"attention_scale": float("inf")}, ValueError, "attention_scale must be finite, got inf"),
    (ATTENTION, {"qk_norm": "batch"}, ValueError, "qk_norm must be one of layer, rms, got 'batch'"),
    (ATTENTION, {"qk_norm": "rms", "qk_eps": -1.0}, ValueError, "qk_eps must be at least 0 and finite, got -1.0"),
    (ATTENTION, {"q_weight": torch.ones(8)}, ValueError, "q_weight needs qk_norm, got qk_norm=None"),
    (ATTENTION, {"qk_norm": "rms", "k_weight": torch.ones(16)}, ValueError, r"k_weight must be \(8,\), shared by the heads"),
    (ATTENTION, {"cos": torch.ones(T, 4)}, ValueError, "sin must be given where the other is, got None"),
    (ATTENTION, {"cos": torch.ones(T, 5), "sin": torch.ones(T, 5)}, ValueError, r"cos must be \(6, P\) or .* from 1 to 4"),
    (ATTENTION, {"cos": torch.ones(3, T, 4), "sin": torch.ones(3, T, 4)}, ValueError, r"got shape \(3, 6, 4\)"),
    (ATTENTION, {"cos": torch.ones(T, 4), "sin": torch.ones(T, 3)}, ValueError, r"sin must be as cos is, \(6, 4\)"),
    (ATTENTION, {"cos": torch.ones(T, 4).requires_grad_(), "sin": torch.ones(T, 4)}, ValueError, "cos must not require a gradient"),
    (MLP, {"activation": "relu"}, ValueError, "activation must be one of gelu_tanh, gelu, swiglu, got 'relu'"),
    (MLP, {"fc1_weight": torch.zeros(25, D), "activation": "swiglu"}, ValueError, r"fc1_weight must be \(2 M, D\)"),
    (MLP, {"fc2_weight": torch.zeros(D, M + 1)}, ValueError, r"fc2_weight must be \(16, 24\), got shape \(16, 25\)"),
    (MLP, {"fc1_weight": torch.zeros(M, D).double()}, TypeError, "must have the other projections' dtype"),
    (MLP, {"x": torch.zeros(B, T, D, device="meta")}, ValueError, "device meta, got cpu"),
]


@pytest.mark.parametrize(("operator", "changed", "error", "told"), [(o, c, e, m) for os, c, e, m in BAD for o in os])
def test_refused(operator, changed, error, told):
    t, options = good(operator)
    call(operator, t, options)
    given = {n: v for n, v in changed.items() if n in OPTIONS}
    with pytest.raises(error, match=told):
        call(operator, t | {n: v for n, v in changed.items() if n not in given}, options | given)


def test_update_ema():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, bias=False)
    before = model.weight.clone()
    for given, error, told in (
        ((model, [1]), TypeError, "model must be a module, got list"),
        (({}, model), TypeError, "ema_model must be a module, got dict"),
        ((model, other), ValueError, "these are not in both: bias"),
        ((model, torch.nn.Linear(4, 2)), ValueError, r"weight must have the shape \(2, 3\) that it has in ema_model, got \(2, 4\)"),
        ((model, torch.nn.Linear(3, 2, device="meta")), ValueError, "weight must be on ema_model's device cpu, got meta"),
        ((model, model, 1.5), ValueError, "decay must be in 0..1, got 1.5"),
        ((model, model, "0.9"), TypeError, "decay must be a number, got str"),
    ):
        with pytest.raises(error, match=told):
            mk.update_ema(*given)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("width", "heads"), ((20, 2), (16, 0), (16, 3)))
def test_modules(width, heads):
    with pytest.raises(ValueError, match="num_heads must divide hidden_size"):
        mk.nn.DiTBlock(width, heads)
    with pytest.raises(ValueError, match="activation must be one of"):
        mk.nn.DiTBlock(16, 2, activation="relu")
    with pytest.raises(ValueError, match="norm must be one of"):
        mk.nn.FinalLayer(16, 2, 4, norm="batch")
