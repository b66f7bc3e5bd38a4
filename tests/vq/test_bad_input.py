"""Bad input raises TypeError or ValueError that names the argument, what it got and what it takes. Values never raise."""

import os
import subprocess
import sys

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

X, CODEBOOK = torch.zeros(5, 4), torch.zeros(3, 4)
HEADS, VALID = torch.zeros(2, 3, 4), torch.ones(5, dtype=torch.bool)
META = torch.device("meta")
MANY = torch.zeros(1, 4).expand(2**31, 4)  # 2^31 codes in 16 bytes

# x, codebook, other arguments, the error, what its message says
BOTH = {
    "x_list": ([[0.0]], CODEBOOK, {}, TypeError, "x must be a tensor, got list"),
    "codebook_none": (X, None, {}, TypeError, "codebook must be a tensor, got NoneType"),
    "x_int": (X.int(), CODEBOOK, {}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int32"),
    "x_complex": (X.cfloat(), CODEBOOK, {}, TypeError, "x must be .*got torch.complex64"),
    "codebook_bool": (X, CODEBOOK.bool(), {}, TypeError, "codebook must be .*got torch.bool"),
    "codebook_float8": (X, CODEBOOK.to(torch.float8_e4m3fn), {}, TypeError, "codebook must be .*got torch.float8"),
    "codebook_rank_1": (X, CODEBOOK[0], {}, ValueError, r"codebook must be \(K, D\) or \(H, K, D\), got shape \(4,\)"),
    "codebook_rank_4": (X, HEADS[None], {}, ValueError, r"codebook must be .*got shape \(1, 2, 3, 4\)"),
    "x_rank_0": (torch.tensor(1.0), CODEBOOK, {}, ValueError, r"x must be .*got shape \(\)"),
    "x_rank_1_heads": (X[0], HEADS, {}, ValueError, r"x must be \(H, ..., D\).*got shape \(4,\)"),
    "dim": (X, CODEBOOK[:, :3], {}, ValueError, r"x and codebook must agree in D, got x \(5, 4\) and codebook \(3, 3\)"),
    "heads": (torch.zeros(3, 5, 4), HEADS, {}, ValueError, r"x and codebook must agree in H, got x \(3, 5, 4\)"),
    "no_codes": (X, CODEBOOK[:0], {}, ValueError, r"codebook must hold 1 to 2\^31 - 1 codes, got K = 0"),
    "no_codes_heads": (X[:2], HEADS[:, :0], {}, ValueError, "codebook must hold .*got K = 0"),
    "too_many_codes": (X, MANY, {}, ValueError, "codebook must hold .*got K = 2147483648"),
    "no_dim": (X[:, :0], CODEBOOK[:, :0], {}, ValueError, r"codebook must have D >= 1, got shape \(3, 0\)"),
    "device": (X, CODEBOOK.to(META), {}, ValueError, "codebook must be on x's device cpu, got meta"),
    "x_device": (X.to(META), CODEBOOK, {}, ValueError, "codebook must be on x's device meta, got cpu"),
    "mask_list": (X, CODEBOOK, {"mask": [True] * 5}, TypeError, "mask must be a bool tensor, got list"),
    "mask_dtype": (X, CODEBOOK, {"mask": torch.ones(5)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    "mask_shape": (X, CODEBOOK, {"mask": VALID[:4]}, ValueError, r"mask must have x's leading shape \(5,\), got \(4,\)"),
    "mask_rank": (X, CODEBOOK, {"mask": VALID[:, None]}, ValueError, r"mask must .*got \(5, 1\)"),
    "mask_device": (X, CODEBOOK, {"mask": VALID.to(META)}, ValueError, "mask must be on x's device cpu, got meta"),
    "metric": (X, CODEBOOK, {"metric": "l1"}, ValueError, "metric must be one of l2, cosine, dot, got 'l1'"),
    "metric_none": (X, CODEBOOK, {"metric": None}, ValueError, "metric must be one of .*got None"),
    "precision": (X, CODEBOOK, {"precision": "high"}, ValueError, "precision must be one of exact, fast, got 'high'"),
}  # fmt: skip
QUANTIZE = {
    "gradient": ({"gradient": "gumbel"}, ValueError, "gradient must be one of straight_through, rotation, got 'gumbel'"),
    "beta_string": ({"beta": "0.25"}, TypeError, "beta must be a number, got str"),
    "beta_tensor": ({"beta": torch.tensor(0.25)}, TypeError, "beta must be a number, got Tensor"),
    "beta_none": ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
    "legacy_beta_string": ({"legacy_beta": "yes"}, TypeError, "legacy_beta must be a bool, got str"),
    "legacy_beta_tensor": ({"legacy_beta": torch.tensor(True)}, TypeError, "legacy_beta must be a bool, got Tensor"),
}


@pytest.mark.parametrize("function", (mk.nearest_code, mk.vector_quantize))
@pytest.mark.parametrize("name", BOTH)
def test_bad_input(function, name):
    x, codebook, others, error, message = BOTH[name]
    with pytest.raises(error, match=f"^{message}"):
        function(x, codebook, **others)


@pytest.mark.parametrize("name", QUANTIZE)
def test_bad_options(name):
    others, error, message = QUANTIZE[name]
    with pytest.raises(error, match=f"^{message}"):
        mk.vector_quantize(X, CODEBOOK, **others)


@pytest.mark.parametrize("name", ["dim", "metric", "mask_dtype", "no_codes"])
def test_bad_input_in_compiled_code(name):
    x, codebook, others, _, message = BOTH[name]
    compiled = torch.compile(lambda a, b: mk.nearest_code(a, b, **others), backend="aot_eager")
    with pytest.raises(Exception, match=message):
        compiled(x, codebook)


def test_unknown_keywords_and_positional_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'metrics'"):
        mk.nearest_code(X, CODEBOOK, metrics="l2")
    with pytest.raises(TypeError, match="positional"):
        mk.nearest_code(X, CODEBOOK, "l2")


@pytest.mark.parametrize("implementation", battery.implementations("vector_quantize", torch.device("cpu")))
@pytest.mark.parametrize("beta", (0.0, -1.0, 1e30, float("inf"), float("nan")))
def test_values_never_raise(implementation, beta):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0])
    x, codebook = bad[torch.randint(0, 5, (64, 4))].requires_grad_(), bad[torch.randint(0, 5, (33, 4))].requires_grad_()
    with mk.use_backend(implementation):
        for metric in ("l2", "cosine", "dot"):
            out = mk.vector_quantize(x, codebook, beta=beta, metric=metric, gradient="rotation")
            assert ((out.indices >= 0) & (out.indices < 33)).all()
            (out.loss + out.quantized.sum()).backward()


CLAMPED = """
import torch, mmgen_kernels
operator = torch.ops.mmgen_kernels.vector_quantize_backward
overload = operator.reference if {implementation!r} == "reference" else operator.default
x = torch.arange(20.0).view(5, 4)
for index in (3, 7, 2**40, -2, -(2**40)):
    indices = torch.tensor([0, 1, 2, 0, index])
    results = []
    for given in (indices, indices.clamp(-1, 2)):
        results.append(overload(
            None, torch.tensor(1.0), None, None, x + 1, x, given, [3, 4], 0.25, False, "straight_through", True, True))
    for got, expected in zip(*results):
        assert torch.equal(got, expected), (index, got, expected)
print("clamped")
"""


@pytest.mark.parametrize("implementation", battery.implementations("vector_quantize_backward", torch.device("cpu")))
def test_indices_out_of_range_are_clamped(implementation):
    """Only a direct call can bring them; a negative one is a masked row. In a process of its own: what is written out of
    bounds takes the whole test run with it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = CLAMPED.format(implementation=implementation)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.strip() == "clamped", f"exit status {done.returncode}: {done.stderr[-2000:]}"


def test_meta_tensors_have_the_right_shapes():
    """Shape inference without data, as meta-device initialisation does."""
    x, codebook = X.to(META), CODEBOOK.to(META)
    with mk.use_backend("reference"):
        assert mk.nearest_code(x, codebook).shape == (5,) and mk.nearest_code(x, codebook).device == META
        assert mk.vector_quantize(x, codebook).quantized.shape == (5, 4)
    assert mk.vector_quantize(x, codebook).loss.shape == ()
