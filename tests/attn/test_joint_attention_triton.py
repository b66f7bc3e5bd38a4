"""The Triton kernels of joint_attention by the interpreter, without a GPU."""

import importlib.util

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery import tolerance
from mmgen_kernels.battery.attn.data import BF16, FP16, FP32, LAYOUTS
from mmgen_kernels.battery.attn.joint_attention import (
    FLOATS,
    Inputs,
    call,
    padding_of_nan,
    sample_by_sample,
)
from mmgen_kernels.battery.attn.law import formula, model_code
from mmgen_kernels.battery.draws import randn

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
LENGTHS = ((66, 0, 7), (17, 11, 1))
CASES = {
    # lengths of the streams next to tiles of 64, and one that is empty
    "MMDiT": (Inputs(T=(17, 65), B=2, H=2, G=2, D=64), BF16),
    "packed projection": (Inputs(T=(65, 17), B=2, H=2, G=2, layout=LAYOUTS["projection"]), FP16),
    "group": (Inputs(T=(33, 64), B=1, H=4, G=2, D=24), BF16),
    "cross": (Inputs(T=(3, 20), S=(70, 1), B=2, H=1, G=1, D=40), FP16),
    "no tokens in the first": (Inputs(T=(0, 33), B=2, H=1, G=1, D=16), BF16),
    "no keys in the second": (Inputs(T=(9, 17), S=(17, 0), B=2, H=1, G=1, D=16), FP16),
    "lengths": (Inputs(T=(70, 17), B=3, H=1, G=1, key_lengths=LENGTHS, values=padding_of_nan(*LENGTHS)), BF16),
    "lengths of the second": (Inputs(T=(17, 70), B=3, H=2, G=1, D=32, key_lengths=(None, (64, 80, -3))), FP16),
    "fp32": (Inputs(T=(33, 40), B=2, H=2, G=2), FP32),
    "128": (Inputs(T=(16, 65), B=1, H=1, G=1, D=128), BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_against_fp64(process, name):
    process.submit(judge, name).result()


def gradients(function, t, upstream):
    leaves = {n: t[n].detach().requires_grad_() for n in FLOATS}
    outputs = function(t | leaves)
    weights = [u.to(o) for o, u in zip(outputs.values(), upstream, strict=True)]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights, materialize_grads=True)
    return {n: o.detach() for n, o in outputs.items()} | dict(zip(FLOATS, found, strict=True))


def judge(name):
    inputs, dtype = CASES[name]
    t = inputs(torch.device("cpu"), (dtype,))
    upstream = [randn(*t[f"q_{i}"].shape, seed=90 + i).to(dtype) for i in (1, 2)]
    exact = {n: v.double() if n in FLOATS else v for n, v in t.items()}
    truth = gradients(lambda t: sample_by_sample(formula, t, {}), exact, upstream)
    plain = gradients(lambda t: sample_by_sample(model_code, t, {}), t, upstream)
    with mk.use_backend("triton"):
        ours, again = (gradients(lambda t: call(t, {}), t, upstream) for _ in range(2))
    for of, result in ours.items():
        assert torch.equal(result, again[of]), of
        _, failure = tolerance.failure(of, result, plain[of], truth[of])
        assert failure is None, failure


def test_a_sample_has_its_own_bits(process):
    process.submit(judge_bits).result()


def judge_bits():
    """Alone and in a batch, and whatever lies beyond its lengths."""
    t = Inputs(T=(17, 70), B=3, H=2, G=2, D=16, key_lengths=((9, 17, 2), None))(torch.device("cpu"), (BF16,))
    upstream = [randn(*t[f"q_{i}"].shape, seed=90 + i).to(BF16) for i in (1, 2)]
    with mk.use_backend("triton"):
        together = gradients(lambda t: call(t, {}), t, upstream)
        for b in range(3):
            own = gradients(lambda t: call(t, {}), {n: v[b : b + 1] for n, v in t.items()}, [u[b : b + 1] for u in upstream])
            for name, result in own.items():
                assert torch.equal(together[name][b : b + 1], result), (name, b)


@pytest.mark.parametrize("name", FLOATS)
def test_only_what_is_needed(process, name):
    process.submit(judge_need, name).result()


def judge_need(name):
    t = Inputs(T=(5, 9), B=1, H=1, G=1, D=16)(torch.device("cpu"), (FP16,))
    leaves = {n: v.requires_grad_(n == name) for n, v in t.items()}
    with mk.use_backend("triton"):
        outputs = call(leaves, {})
        (found,) = torch.autograd.grad([outputs["out_1"]], [leaves[name]], [torch.ones_like(outputs["out_1"])])
    with mk.use_backend("reference"):
        outputs = call(leaves, {})
        (expected,) = torch.autograd.grad([outputs["out_1"]], [leaves[name]], [torch.ones_like(outputs["out_1"])])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)


def test_no_look_at_a_value():
    """Fake tensors have none: a launcher that asked for one would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmgen_kernels.attn.triton_kernels import joint

    grids = []

    class Silent:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    patch = pytest.MonkeyPatch()
    names = [n for n in vars(joint) if n.startswith("joint_") and hasattr(getattr(joint, n), "params")]
    assert len(names) == 3
    for name in names:
        patch.setattr(joint, name, Silent())
    with FakeTensorMode():
        q, other = torch.empty(3, 70, 4, 72, dtype=BF16), torch.empty(3, 130, 4, 72, dtype=BF16)
        lengths = torch.empty(3, dtype=torch.int64)
        streams = (q, q, q, other, other, other, lengths, None)
        out_1, out_2, lse = joint.joint_attention(*streams, 0.1)
        joint.joint_attention_backward(out_1, None, *streams, out_1, out_2, lse, 0.1, *(True,) * 6)
    patch.undo()
    assert grids == [(3 * 4 * (2 + 3),)] * 3
