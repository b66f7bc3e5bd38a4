"""The activation's Triton kernels by the interpreter, without a GPU, and compiled ahead of time.

What is interpreted runs in a process in which TRITON_INTERPRET is set.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery import tolerance
from mmgen_kernels.battery.blocks.law import activate
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.blocks import activation as reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 5, 24), (1, 1, 2), (2, 1, 2050), (1025, 4), (0, 4), (3, 0))


@pytest.mark.parametrize("kind", ("gelu_tanh", "swiglu"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(process, kind, dtype):
    process.submit(assert_law, kind, dtype).result()


def assert_law(kind, dtype):
    from mmgen_kernels.blocks import triton_kernels

    for shape in SHAPES:
        x, grad = (2 * randn(*shape, seed=1)).to(dtype), randn(*shape[:-1], shape[-1] // (2 if kind == "swiglu" else 1), seed=2)
        grad = grad.to(dtype)
        with mk.use_backend("triton"):
            got = mk.library.OPERATORS["mlp_activation"]("triton", x, kind)
        of_x, again = triton_kernels.mlp_activation_backward(grad, x, kind, True)
        assert torch.equal(got, again)
        plain, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        results = [(activate(leaf, kind), leaf) for leaf in (plain, exact)]
        slopes = [torch.autograd.grad(out, leaf, grad.to(out))[0] for out, leaf in results]
        for name, ours, stock, truth in (("activated", got, *(out for out, _ in results)), ("gradient", of_x, *slopes)):
            if x.numel() > 1000 or dtype in (torch.bfloat16, torch.float16):
                assert tolerance.failure(name, ours, stock.detach(), truth.detach())[1] is None, (shape, name)
            else:
                torch.testing.assert_close(ours, stock.detach())


@pytest.mark.parametrize("kind", ("gelu_tanh", "swiglu"))
def test_far_from_zero(process, kind):
    """Nothing is NaN that is not NaN before, in C++ too: not where an exponential overflows, and not where a slope does."""
    process.submit(assert_finite, kind).result()


def assert_finite(kind):
    from mmgen_kernels.blocks import triton_kernels

    for dtype in (torch.float32, torch.bfloat16):
        far = torch.tensor([-1e30, -1e19, -3e4, -100, -12, -1, 0, 1, 12, 100, 3e4, 1e19, 1e30]).to(dtype)
        x = far if kind == "gelu_tanh" else torch.cat((far, torch.full_like(far, 0.5)))
        grad = torch.ones_like(far)
        for of_x, out in (
            triton_kernels.mlp_activation_backward(grad, x, kind, True),
            torch.ops.mmgen_kernels.mlp_activation_backward(grad, x, kind, True),
        ):
            assert of_x.isfinite().all() and out.isfinite().all()
            expected, _ = reference.reference_backward(grad, x.double(), kind, True)
            torch.testing.assert_close(of_x.double(), expected.nan_to_num(0), rtol=2e-2, atol=1e-6)
    nan = torch.full((4,), torch.nan)
    assert triton_kernels.mlp_activation(nan, kind).isnan().all()
    assert torch.ops.mmgen_kernels.mlp_activation(nan, kind).isnan().all()


def test_compiles_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(mk.__file__).parents[1]), environment.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("compile_blocks.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 2 * 2 * 2 * 3
    for code in found:
        assert code["stack"] == 0 and code["spills"] == 0 and code["fused"] == 0, code
        assert code["registers"] <= 80, code  # six blocks of 4 warps on a multiprocessor
