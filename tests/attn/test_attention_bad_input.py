"""Bad input raises TypeError or ValueError that names the argument, what it got and what it takes. Values never raise."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

Q, K = torch.zeros(3, 6, 4, 8), torch.zeros(3, 5, 2, 8)  # four heads of q read two of k and v
META = torch.device("meta")
LENGTHS, BOUNDS = torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
FLOATS = "float64, float32, bfloat16 or float16"
PACKED = {"q": Q[0], "k": K[0], "v": K[0], "cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS}

# changed arguments, the error, what its message says
DENSE_CASES = {
    "q_list": ({"q": [[0.0]]}, TypeError, "q must be a tensor, got list"),
    "q_none": ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    "q_int": ({"q": Q.int()}, TypeError, f"q must be {FLOATS}, got torch.int32"),
    "q_complex": ({"q": Q.cfloat()}, TypeError, f"q must be {FLOATS}, got torch.complex64"),
    "q_rank_3": ({"q": Q[0]}, ValueError, r"q must be \(B, T, H, D\), got shape \(6, 4, 8\)"),
    "q_rank_5": ({"q": Q[None]}, ValueError, r"q must be \(B, T, H, D\), got shape \(1, 3, 6, 4, 8\)"),
    "q_no_heads": ({"q": Q[:, :, :0]}, ValueError, "k must have a number of heads that divides q's 0, got 2"),
    "D_0": ({"q": Q[..., :0]}, ValueError, "q must have a head dimension that is a multiple of 8, up to 256, got 0"),
    "D_4": ({"q": Q[..., :4]}, ValueError, "q must have a head dimension that is a multiple of 8, up to 256, got 4"),
    "D_12": ({"q": torch.zeros(3, 6, 4, 12)}, ValueError, "q must have a head dimension .*, got 12"),
    "D_264": ({"q": torch.zeros(3, 6, 4, 264)}, ValueError, "q must have a head dimension .*, got 264"),
    "k_list": ({"k": [[0.0]]}, TypeError, "k must have q's dtype torch.float32, got list"),
    "k_half": ({"k": K.half()}, TypeError, "k must have q's dtype torch.float32, got torch.float16"),
    "k_rank_3": ({"k": K[0]}, ValueError, r"k must be \(3, S, G, 8\), got shape \(5, 2, 8\)"),
    "k_samples": ({"k": K[:2]}, ValueError, r"k must be \(3, S, G, 8\), got shape \(2, 5, 2, 8\)"),
    "k_one_sample": ({"k": K[:1]}, ValueError, r"k must be \(3, S, G, 8\), got shape \(1, 5, 2, 8\)"),
    "k_D": ({"k": torch.zeros(3, 5, 2, 16)}, ValueError, r"k must be \(3, S, G, 8\), got shape \(3, 5, 2, 16\)"),
    "k_heads": ({"k": torch.zeros(3, 5, 3, 8)}, ValueError, "v must have k's shape"),
    "kv_heads": ({"k": (t := torch.zeros(3, 5, 3, 8)), "v": t}, ValueError, "k must have .*that divides q's 4, got 3"),
    "kv_more_heads": ({"k": (t := torch.zeros(3, 5, 8, 8)), "v": t}, ValueError, "k must have .*that divides q's 4, got 8"),
    "kv_no_heads": ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, "k must have .*that divides q's 4, got 0"),
    "k_device": ({"k": K.to(META)}, ValueError, "k must be on q's device cpu, got meta"),
    "v_none": ({"v": None}, TypeError, "v must have q's dtype torch.float32, got NoneType"),
    "v_double": ({"v": K.double()}, TypeError, "v must have q's dtype torch.float32, got torch.float64"),
    "v_shape": ({"v": K[:, :4]}, ValueError, r"v must have k's shape \(3, 5, 2, 8\), got \(3, 4, 2, 8\)"),
    "v_other_D": ({"v": torch.zeros(3, 5, 2, 16)}, ValueError, r"v must have k's shape \(3, 5, 2, 8\), got \(3, 5, 2, 16\)"),
    "v_device": ({"v": K.to(META)}, ValueError, "v must be on q's device cpu, got meta"),
    "bias_list": ({"bias": [0.0]}, TypeError, "bias must be a tensor, got list"),
    "bias_bool": ({"bias": torch.ones(6, 5, dtype=torch.bool)}, TypeError, f"bias must be {FLOATS}, got torch.bool"),
    "bias_int": ({"bias": torch.ones(6, 5).int()}, TypeError, f"bias must be {FLOATS}, got torch.int32"),
    "bias_keys": ({"bias": torch.zeros(6, 4)}, ValueError, r"bias must broadcast to \(B, H, T, S\) = \(3, 4, 6, 5\), got .*6, 4"),
    "bias_queries": ({"bias": torch.zeros(5, 5)}, ValueError, r"bias must broadcast to .*got shape \(5, 5\)"),
    "bias_heads": ({"bias": torch.zeros(2, 6, 5)}, ValueError, r"bias must broadcast to .*got shape \(2, 6, 5\)"),
    "bias_samples": ({"bias": torch.zeros(2, 1, 1, 1)}, ValueError, r"bias must broadcast to .*got shape \(2, 1, 1, 1\)"),
    "bias_rank_5": ({"bias": torch.zeros(1, 1, 1, 1, 1)}, ValueError, r"bias must broadcast to .*got shape \(1, 1, 1, 1, 1\)"),
    "bias_device": ({"bias": torch.zeros(6, 5, device=META)}, ValueError, "bias must be on q's device cpu, got meta"),
    "key_lengths_list": ({"key_lengths": [1, 2, 3]}, TypeError, "key_lengths must be int32 or int64, got list"),
    "key_lengths_float": ({"key_lengths": LENGTHS.float()}, TypeError, "key_lengths must be int32 or int64, got torch.float32"),
    "key_lengths_int16": ({"key_lengths": LENGTHS.short()}, TypeError, "key_lengths must be int32 or int64, got torch.int16"),
    "key_lengths_shape": ({"key_lengths": LENGTHS[:2]}, ValueError, r"key_lengths must be \(3,\), a number .*got shape \(2,\)"),
    "key_lengths_rank": ({"key_lengths": LENGTHS[:, None]}, ValueError, r"key_lengths must be \(3,\), .*got shape \(3, 1\)"),
    "key_lengths_device": ({"key_lengths": LENGTHS.to(META)}, ValueError, "key_lengths must be on q's device cpu, got meta"),
    "scale_string": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "scale_bool": ({"scale": True}, TypeError, "scale must be a number, got bool"),
    "scale_tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, got Tensor"),
}
PACKED_CASES = {
    "q_dense": ({"q": Q}, ValueError, r"q must be \(N, H, D\) with cu_seqlens_q, got shape \(3, 6, 4, 8\)"),
    "k_dense": ({"k": K}, ValueError, r"k must be \(M, G, 8\), got shape \(3, 5, 2, 8\)"),
    "v_dense": ({"v": K}, ValueError, r"v must have k's shape \(5, 2, 8\), got \(3, 5, 2, 8\)"),
    "k_D": ({"k": torch.zeros(5, 2, 16)}, ValueError, r"k must be \(M, G, 8\), got shape \(5, 2, 16\)"),
    "heads": ({"k": (t := torch.zeros(5, 3, 8)), "v": t}, ValueError, "k must have .*that divides q's 4, got 3"),
    "bias": ({"bias": torch.zeros(6, 5)}, ValueError, "bias must be None with cu_seqlens_q"),
    "key_lengths": ({"key_lengths": BOUNDS}, ValueError, "key_lengths must be None with cu_seqlens_q"),
    "only_q": ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_k must be given where the other is, got None"),
    "only_k": ({"cu_seqlens_q": None}, ValueError, "cu_seqlens_q must be given where the other is, got None"),
    "bounds_list": ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q must be int32 or int64, got list"),
    "bounds_k_list": ({"cu_seqlens_k": [0, 5]}, TypeError, "cu_seqlens_k must be int32 or int64, got list"),
    "bounds_float": ({"cu_seqlens_k": BOUNDS.float()}, TypeError, "cu_seqlens_k must be int32 or int64, got torch.float32"),
    "bounds_uint8": ({"cu_seqlens_q": BOUNDS.byte()}, TypeError, "cu_seqlens_q must be int32 or int64, got torch.uint8"),
    "bounds_rank": ({"cu_seqlens_q": BOUNDS[None]}, ValueError, r"cu_seqlens_q must be \(C \+ 1,\) .*got shape \(1, 4\)"),
    "bounds_k_rank": ({"cu_seqlens_k": BOUNDS[None]}, ValueError, r"cu_seqlens_k must be \(C \+ 1,\) .*got shape \(1, 4\)"),
    "bounds_empty": ({"cu_seqlens_q": BOUNDS[:0]}, ValueError, r"cu_seqlens_q must be \(C \+ 1,\) .*got shape \(0,\)"),
    "bounds_unequal": ({"cu_seqlens_k": BOUNDS[:3]}, ValueError, r"cu_seqlens_k must have .*shape \(4,\), got \(3,\)"),
    "bounds_device": ({"cu_seqlens_q": BOUNDS.to(META)}, ValueError, "cu_seqlens_q must be on q's device cpu, got meta"),
    "bounds_k_device": ({"cu_seqlens_k": BOUNDS.to(META)}, ValueError, "cu_seqlens_k must be on q's device cpu, got meta"),
}


@pytest.mark.parametrize("name", DENSE_CASES)
def test_bad_input(name):
    changed, error, message = DENSE_CASES[name]
    with pytest.raises(error, match=f"^{message}"):
        mk.attention(**({"q": Q, "k": K, "v": K} | changed))


@pytest.mark.parametrize("name", PACKED_CASES)
def test_bad_packed_input(name):
    changed, error, message = PACKED_CASES[name]
    with pytest.raises(error, match=f"^{message}"):
        mk.attention(**(PACKED | changed))


def test_bad_input_under_autocast():
    """The casts come first and leave what is no float to the checks."""
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("q_list", "q_int", "q_none", "k_list", "v_none", "D_12", "bias_int"):
            changed, error, message = DENSE_CASES[name]
            with pytest.raises(error, match=f"^{message.replace('float32, got', 'bfloat16, got')}"):
                mk.attention(**({"q": Q, "k": K, "v": K} | changed))
        with pytest.raises(TypeError, match=r"^k must have q's dtype torch.bfloat16, got torch.float64"):
            mk.attention(Q, K.double(), K)


def test_unknown_keywords_and_positional_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        mk.attention(Q, K, K, is_causal=True)
    with pytest.raises(TypeError, match="positional"):
        mk.attention(Q, K, K, True)


def test_bad_input_in_compiled_code():
    compiled = torch.compile(lambda q, k, bias: mk.attention(q, k, k, bias=bias), backend="aot_eager")
    with pytest.raises(Exception, match=r"bias must broadcast to \(B, H, T, S\)"):
        compiled(Q, K, torch.zeros(6, 4))


@pytest.mark.parametrize("implementation", battery.implementations("attention", torch.device("cpu")))
def test_values_never_raise(implementation):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0])

    def drawn(*shape):
        return bad[torch.randint(0, 5, shape)].requires_grad_()

    lengths = torch.tensor([-(2**63), 2**63 - 1, 3])
    bounds = torch.tensor([2**40, -7, -(2**63), 2**63 - 1])  # neither in range nor in order
    with mk.use_backend(implementation):
        for scale in (torch.nan, torch.inf, 0.0, -1.0):
            q, k, v, bias = drawn(3, 6, 4, 8), drawn(3, 5, 2, 8), drawn(3, 5, 2, 8), drawn(4, 6, 5)
            out, lse = mk.attention(q, k, v, bias=bias, key_lengths=lengths, scale=scale, return_lse=True)
            (out.sum() + lse.sum()).backward()
            out = mk.attention(q[0], k[0], v[0], cu_seqlens_q=bounds, cu_seqlens_k=bounds, causal=True, scale=scale)
            out.sum().backward()


def test_meta_tensors_have_the_right_shapes():
    """Shape inference without data, as meta-device initialisation does."""
    q, k = Q.to(META).bfloat16(), K.to(META).bfloat16()
    with mk.use_backend("reference"):
        out, lse = mk.attention(q, k, k, bias=torch.zeros(6, 5, device=META), key_lengths=LENGTHS.to(META), return_lse=True)
        bounds = {"cu_seqlens_q": BOUNDS.to(META), "cu_seqlens_k": BOUNDS.to(META)}
        packed, packed_lse = mk.attention(q[0], k[0], k[0], **bounds, return_lse=True)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.device == lse.device == META
    assert lse.shape == (3, 4, 6) and lse.dtype == torch.float32
    assert packed.shape == q[0].shape and packed_lse.shape == (4, 6)
