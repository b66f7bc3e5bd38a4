"""The Triton kernels of the family by the interpreter, without a GPU: against the reference, and what else they promise.

Each test runs in a process in which TRITON_INTERPRET is set.
"""

import importlib.util

import pytest
import torch
from modulation_runs import BF16, F32, F64, OPTIONS, VECTORS, assert_law, assert_same, by, random, run

import mmgen_kernels as mk
from mmgen_kernels.modulation import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("options", OPTIONS)
def test_the_seam(process, options):
    process.submit(assert_law, **OPTIONS[options]).result()


@pytest.mark.parametrize("options", ("DiT", "tokens, table, two outputs, affine", "rows of int32, table, two outputs", "autocast"))
def test_adaln(process, options):
    kept = {n: v for n, v in OPTIONS[options].items() if n not in ("gate_fn", "post_norm")}
    process.submit(assert_law, operator="adaln", **kept).result()


@pytest.mark.parametrize("options", ("DiT", "frames, tanh, sandwich, rms", "rows of int64, affine, sandwich", "autocast"))
def test_gate_residual(process, options):
    kept = {n: v for n, v in OPTIONS[options].items() if n not in ("out", "affine", "norm")}
    process.submit(assert_law, operator="gate_residual", **kept).result()


@pytest.mark.parametrize(("T", "D", "dtype"), ((1, 200, F32), (255, 24, F64), (256, 100, F32), (257, 24, F64)))
def test_lengths(process, T, D, dtype):
    process.submit(assert_law, dims=(3, T, D), table=True, dtypes=(dtype,) * 3).result()


@pytest.mark.parametrize("D", (1, 3, 130, 1152))
def test_hidden_sizes(process, D):
    """D = 130 has a tile of two columns, 1152 is 1024 + 128. fp64 where so few numbers would be a matter of luck in fp32."""
    process.submit(assert_law, dims=(3, 2, D), post_norm="rms", dtypes=(F32,) * 3 if D > 3 else (F64,) * 3).result()


@pytest.mark.parametrize("operator", ("adaln", "gate_residual_adaln"))
def test_a_mean_a_thousand_deviations_from_zero(process, operator):
    process.submit(assert_law, operator=operator, dims=(3, 4, 300), mean=1000.0).result()


def test_tanh_near_zero_and_far(process):
    process.submit(tanh_is_right).result()


def tanh_is_right():
    for dtype, error in ((F32, 4e-7), (F64, 1e-15)):
        gate = torch.cat((torch.logspace(-30, 2.3, 400, dtype=dtype), torch.linspace(0.4, 0.8, 200, dtype=dtype)))
        gate = torch.cat((gate, -gate, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)))
        x, y = torch.zeros(1, 2, len(gate), dtype=dtype), torch.ones(1, 2, len(gate), dtype=dtype)
        with mk.use_backend("triton"):
            found = ops.gate_residual(x, y, gate, gate_fn="tanh")[0, 0]
        expected = gate.double().tanh()
        near = ((found - expected).abs() <= error * expected.abs()) | (found.isnan() & expected.isnan())
        assert near.all(), gate[~near]


# -- the rest of the contract -----------------------------------------------------------------------------------------


def test_launches(process):
    process.submit(count_launches).result()


def count_launches():
    from mmgen_kernels.modulation.triton_kernels import backward, forward, sums

    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel.__name__)
            return self.kernel[grid]

    for module, name in ((forward, "modulate_tokens"), (backward, "backward_chunks"), (sums, "sum_chunks")):
        setattr(module, name, Counted(getattr(module, name)))
    try:
        for options, expected in (
            ({"table": True, "two": True, "affine": True}, ["modulate_tokens", "backward_chunks", "sum_chunks"]),
            ({"address": "token"}, ["modulate_tokens", "backward_chunks"]),
            ({"dims": (3, 0, 12), "affine": True}, []),
            ({"dims": (0, 4, 12), "address": "row32", "table": True}, []),
        ):
            launched.clear()
            inputs, call = run(**options)
            assert_same(by("triton", call, inputs), by("reference", call, inputs)) if not expected else by("triton", call, inputs)
            assert launched == expected
    finally:
        for module, name in ((forward, "modulate_tokens"), (backward, "backward_chunks"), (sums, "sum_chunks")):
            setattr(module, name, getattr(module, name).kernel)


def test_a_gradient_that_nobody_needs_is_empty(process):
    process.submit(only_what_is_needed).result()


def only_what_is_needed():
    """One at a time, and of two with the table; missing upstream gradients count as 0."""
    inputs, _ = run(dims=(3, 5, 12), affine=True, post_norm="rms", dtypes=(BF16, F32, F32))
    views = [inputs.get(n) for n in VECTORS]
    affine = [inputs["weight"], inputs["bias"], inputs["post_weight"]]
    fixed = (*views, *affine, random(3, 12, seed=3), None, "tanh", "rms")
    overloads = torch.ops.mmgen_kernels.gate_residual_adaln
    out = overloads.reference(inputs["x"], inputs["y"], *fixed, 1e-6, "layer", 1e-6, BF16)
    upstream = random(3, 5, 12, seed=7, dtype=BF16)
    for needed in ({0}, {1}, {2, 10}, {3}, {7, 4}, {9}, {10}):
        for grads in ((upstream, None, None), (None, upstream, None)):
            given = (*grads, inputs["y"], out[0], out[3], out[4], *fixed, "layer", *(i in needed for i in range(11)))
            backward = torch.ops.mmgen_kernels.gate_residual_adaln_backward
            for ours, plain in zip(backward.triton(*given), backward.reference(*given), strict=True):
                assert ours.shape == plain.shape and ours.dtype == plain.dtype
                assert torch.allclose(ours.double(), plain.double(), rtol=1e-2, atol=1e-5)


def test_nan_stays_in_its_token(process):
    process.submit(nan_stays).result()


def nan_stays():
    for value in (float("nan"), float("inf")):
        inputs, _ = run(dims=(3, 5, 12))
        inputs["x"][1, 2, 3] = value
        with mk.use_backend("triton"):
            residual, modulated = ops.gate_residual_adaln(*(inputs[n] for n in ("x", "y", "gate", "shift", "scale")))
        there = torch.zeros(3, 5, dtype=torch.bool)
        there[1, 2] = True
        assert torch.equal(modulated.isnan().all(-1), there) and torch.equal(modulated.isnan().any(-1), there)
        assert (~residual.isfinite()).sum() == 1


def test_opcheck(process):
    process.submit(check_operators).result()


def check_operators():
    inputs, _ = run(dims=(3, 4, 5))
    x, y, gate, shift, scale = (inputs[n].requires_grad_() for n in ("x", "y", *VECTORS[:3]))
    none = [None] * 4
    of = torch.ops.mmgen_kernels
    torch.library.opcheck(of.adaln.triton, (x, shift, scale, *none[:2], *none, "layer", 1e-6, F32))
    torch.library.opcheck(of.gate_residual.triton, (x, y, gate, *none[:3], "tanh", "rms", 1e-6))
