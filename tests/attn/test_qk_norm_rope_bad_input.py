"""Bad input raises TypeError or ValueError that names the argument, what it got and what it takes. Values never raise."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

Q, K = torch.zeros(2, 6, 3, 8), torch.zeros(2, 6, 2, 8)
W, TABLE = torch.ones(8), torch.zeros(6, 4)
META = torch.device("meta")

# changed arguments, the error, what its message says
BAD = {
    "q_list": ({"q": [0.0]}, TypeError, "q must be a tensor, got list"),
    "q_int": ({"q": Q.int()}, TypeError, "q must be float64, float32, bfloat16 or float16, got torch.int32"),
    "q_rank": ({"q": Q[0]}, ValueError, r"q must be \(B, T, H, D\).*got shape \(6, 3, 8\)"),
    "q_no_heads": ({"q": Q[:, :, :0]}, ValueError, r"q must be .*H and D at least 1, got shape \(2, 6, 0, 8\)"),
    "q_no_channels": ({"q": Q[..., :0]}, ValueError, r"q must be .*got shape \(2, 6, 3, 0\)"),
    "k_list": ({"k": None}, TypeError, "k must have q's dtype torch.float32, got NoneType"),
    "k_dtype": ({"k": K.half()}, TypeError, "k must have q's dtype torch.float32, got torch.float16"),
    "k_device": ({"k": K.to(META)}, ValueError, "k must be on q's device cpu, got meta"),
    "k_samples": ({"k": K[:1]}, ValueError, r"k must be \(2, S, G, 8\).*got shape \(1, 6, 2, 8\)"),
    "k_channels": ({"k": K[..., :7]}, ValueError, r"k must be \(2, S, G, 8\).*got shape \(2, 6, 2, 7\)"),
    "k_no_heads": ({"k": K[:, :, :0]}, ValueError, r"k must be .*G at least 1, got shape \(2, 6, 0, 8\)"),
    "k_tokens": ({"k": K[:, :5]}, ValueError, "k must have q's 6 tokens where cos and sin are given, got 5"),
    "norm": ({"norm": "batch"}, ValueError, "norm must be one of layer, rms, got 'batch'"),
    "across_nothing": (
        {"norm": None, "across_heads": True, "q_weight": None},
        ValueError,
        "across_heads must be False without a norm",
    ),
    "eps_string": ({"eps": "1"}, TypeError, "eps must be a number, got str"),
    "eps_none": ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
    "eps_negative": ({"eps": -1e-6}, ValueError, "eps must be at least 0 and finite, got -1e-06"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps must be at least 0 and finite, got nan"),
    "weight_without_norm": ({"norm": None}, ValueError, "q_weight needs a norm, got norm=None"),
    "bias_without_norm": ({"norm": None, "q_weight": None, "k_bias": W}, ValueError, "k_bias needs a norm, got norm=None"),
    "weight_shape": ({"q_weight": torch.ones(9)}, ValueError, r"q_weight must be \(8,\), D, shared by the heads, got shape \(9,\)"),
    "weight_of_all_heads": ({"k_weight": torch.ones(16)}, ValueError, r"k_weight must be \(8,\).*got shape \(16,\)"),
    "weight_rank": ({"k_weight": torch.ones(1, 8)}, ValueError, r"k_weight must be \(8,\).*got shape \(1, 8\)"),
    "weight_across": ({"across_heads": True}, ValueError, r"q_weight must be \(24,\), H D, across heads, got shape \(8,\)"),
    "bias_across": (
        {"across_heads": True, "q_weight": None, "k_bias": torch.ones(24)},
        ValueError,
        r"k_bias must be \(16,\).*\(24,\)",
    ),
    "weight_int": ({"k_weight": W.int()}, TypeError, "k_weight must be .*got torch.int32"),
    "bias_device": ({"q_bias": W.to(META)}, ValueError, "q_bias must be on q's device cpu, got meta"),
    "no_sin": ({"sin": None}, ValueError, "sin must be given where the other is, got None"),
    "no_cos": ({"cos": None}, ValueError, "cos must be given where the other is, got None"),
    "cos_int": ({"cos": TABLE.int()}, TypeError, "cos must be .*got torch.int32"),
    "cos_complex": ({"cos": TABLE.cfloat()}, TypeError, "cos must be .*got torch.complex64"),
    "sin_dtype": ({"sin": TABLE.half()}, TypeError, "sin must have cos's dtype torch.float32, got torch.float16"),
    "sin_device": ({"sin": TABLE.to(META)}, ValueError, "sin must be on q's device cpu, got meta"),
    "sin_shape": ({"sin": TABLE[:, :3]}, ValueError, r"sin must have cos's shape \(6, 4\), got \(6, 3\)"),
    "each_angle_twice": (
        {"cos": torch.zeros(6, 8)},
        ValueError,
        r"cos must be \(6, P\) or \(2, 6, P\).*P from 1 to 4, got shape \(6, 8\); of",
    ),
    "no_pairs": ({"cos": TABLE[:, :0]}, ValueError, r"cos must be .*got shape \(6, 0\)"),
    "cos_tokens": ({"cos": TABLE[:5]}, ValueError, r"cos must be \(6, P\).*got shape \(5, 4\)"),
    "cos_samples": ({"cos": TABLE.expand(3, 6, 4)}, ValueError, r"cos must be .*\(2, 6, P\).*got shape \(3, 6, 4\)"),
    "cos_one_sample": ({"cos": TABLE[None]}, ValueError, r"cos must be .*got shape \(1, 6, 4\)"),
    "cos_rank": ({"cos": TABLE[0]}, ValueError, r"cos must be .*got shape \(4,\)"),
    "cos_gradient": (
        {"cos": torch.zeros(6, 4, requires_grad=True)},
        ValueError,
        r"cos must not require a gradient.*cos\.detach\(\)",
    ),
    "sin_gradient": ({"sin": torch.zeros(6, 4, requires_grad=True)}, ValueError, r"sin must not require a gradient"),
}


def given(**changed):
    return {"q": Q, "k": K, "q_weight": W, "cos": TABLE, "sin": TABLE} | changed


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("implementation", battery.implementations("qk_norm_rope", torch.device("cpu")))
def test_bad_input(implementation, name):
    changed, error, message = BAD[name]
    with mk.use_backend(implementation), pytest.raises(error, match=message):
        mk.qk_norm_rope(**given(**changed))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        (([0.0], (2,)), TypeError, "positions must be a real tensor, got list"),
        ((torch.zeros(3, 1, dtype=torch.cfloat), (2,)), TypeError, "positions must be a real tensor, got torch.complex64"),
        ((torch.zeros(3, 1), (3,)), ValueError, r"dims must be even numbers, one for each axis, got \(3,\)"),
        ((torch.zeros(3, 0), ()), ValueError, r"dims must be even numbers, one for each axis, got \(\)"),
        ((torch.zeros(3), (2,)), ValueError, r"positions must be \(\.\.\., T, 1\), .*got shape \(3,\)"),
        ((torch.zeros(3, 2), (2, 4, 2)), ValueError, r"positions must be \(\.\.\., T, 3\), .*got shape \(3, 2\)"),
        (
            (torch.zeros(3, 2), (2, 4), (10.0,)),
            ValueError,
            r"theta must be a positive number or one for each of dims, got \(10.0,\)",
        ),
        ((torch.zeros(3, 2), (2, 4), -1.0), ValueError, "theta must be a positive number .*got -1.0"),
    ),
)
def test_bad_table(arguments, error, message):
    with pytest.raises(error, match=message):
        mk.rope_table(*arguments)


def test_a_table_with_gradient_is_taken_where_nothing_is_recorded():
    table = torch.zeros(6, 4, requires_grad=True)
    with torch.no_grad():
        assert mk.qk_norm_rope(**given(cos=table))[0].shape == Q.shape


def test_good_input_of_meta_tensors_has_shapes():
    q, k = mk.qk_norm_rope(**{name: tensor.to(META) for name, tensor in given().items()})
    assert q.device == META and q.shape == Q.shape and k.shape == K.shape
