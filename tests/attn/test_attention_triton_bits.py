"""What the Triton kernels promise of bits, by the interpreter: again and alone, by either backward, packed or not."""

import importlib.util

import pytest
import torch
from attention_runs import BF16, F16, F32, assert_same, by, inputs_of, judge, random

import mmgen_kernels as mk
from mmgen_kernels.attn import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
LONG = pytest.mark.long

BITS = {
    "short": {"dims": (3, 65, 70, 1, 1, 72), "dtype": BF16},
    "two kernels": {"dims": (3, 33, 70, 1, 1, 96), "dtype": F16},
    "causal": {"dims": (3, 70, 65, 2, 2, 24), "dtype": F16, "causal": True},
    "fp32": {"dims": (3, 33, 70, 2, 1, 8), "dtype": F32},
}


@pytest.mark.parametrize("name", [n if n in ("short", "two kernels") else pytest.param(n, marks=LONG) for n in BITS])
def test_same_bits_again_and_alone(process, name):
    process.submit(again_and_alone, **BITS[name]).result()


def again_and_alone(dims, dtype, causal=False):
    inputs, lengths = inputs_of(dims, dtype), torch.tensor([dims[2], 33, 64])
    whole, again = (by("triton", inputs, causal=causal, key_lengths=lengths) for _ in range(2))
    assert_same(whole, again)
    with mk.use_backend("triton"):
        for b in (0, 2):
            given = {n: t[b : b + 1].detach().requires_grad_() for n, t in inputs.items()}
            out, lse = ops.attention(*given.values(), causal=causal, key_lengths=lengths[b : b + 1], return_lse=True)
            upstream = random(*whole["out"].shape, seed=11).to(dtype)[b : b + 1], random(*whole["lse"].shape, seed=12)[b : b + 1]
            alone = (out, lse, *torch.autograd.grad((out, lse), list(given.values()), upstream))
            for (key, of_whole), one in zip(whole.items(), alone, strict=True):
                assert torch.equal(of_whole[b : b + 1], one), key


def test_one_head_is_as_many(process):
    process.submit(one_head).result()


def one_head():
    inputs = inputs_of((2, 33, 70, 4, 2, 72), BF16)
    with mk.use_backend("triton"):
        out = ops.attention(*inputs.values())
        one = ops.attention(inputs["q"][:, :, 2:3], *(inputs[n][:, :, 1:] for n in "kv"))
    assert torch.equal(out[:, :, 2:3], one)


@pytest.mark.parametrize(("D", "causal"), [(72, False), (8, True), pytest.param(72, True, marks=LONG)])
def test_short_is_as_the_two_kernels(process, D, causal):
    process.submit(short_as_two, D, causal).result()


def short_as_two(D, causal):
    from mmgen_kernels.attn.triton_kernels import backward

    bias = (1, 2, 70, 130) if D == 8 else None
    inputs = inputs_of((2, 70, 130, 2, 1, D), BF16, bias)
    options = {"causal": causal, "key_lengths": torch.tensor([130, 64])}
    launched = count(backward, "attention_backward_short")
    short = by("triton", inputs, **options)
    assert launched() == 1
    patch = pytest.MonkeyPatch()
    patch.setattr(backward, "is_short", lambda T, S: False)
    with patch.context():
        two = by("triton", inputs, **options)
    patch.undo()
    assert launched() == 1
    assert_same(short, two)


def count(module, name):
    """A function that tells how often the kernel was launched."""
    kernel, launches = getattr(module, name), []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    setattr(module, name, Counted())
    return lambda: len(launches)


@pytest.mark.parametrize(("dtype", "causal"), [(BF16, False), (F32, True), pytest.param(BF16, True, marks=LONG)])
def test_packed_is_as_dense(process, dtype, causal):
    process.submit(packed_as_dense, dtype, causal).result()


def packed_as_dense(dtype, causal):
    """Sequences of queries and keys of different lengths, some empty; tokens in no sequence before and after."""
    lengths_q, lengths_k = (65, 0, 1, 33, 7), (70, 5, 64, 0, 129)
    starts_q, starts_k = (torch.tensor([3, *lengths_q]).cumsum(0), torch.tensor([0, *lengths_k]).cumsum(0))
    N, M, H, G, D = int(starts_q[-1]) + 2, int(starts_k[-1]) + 5, 2, 1, 72
    inputs = {n: t[0] for n, t in inputs_of((1, N, M, H, G, D), dtype).items()}
    inputs["q"][:3] = torch.nan
    inputs["k"][-5:] = torch.nan
    bounds = {"cu_seqlens_q": starts_q.int(), "cu_seqlens_k": starts_k.int()}
    packed = by("triton", inputs, causal=causal, **bounds)
    upstream, upstream_lse = random(N, H, D, seed=11).to(dtype), random(H, N, seed=12)
    covered = {"q": torch.zeros(N, dtype=torch.bool), "k": torch.zeros(M, dtype=torch.bool)}
    for c in range(5):
        own_q, own_k = slice(*starts_q[c : c + 2].tolist()), slice(*starts_k[c : c + 2].tolist())
        covered["q"][own_q], covered["k"][own_k] = True, True
        given = [inputs[n][None, own].detach().requires_grad_() for n, own in zip("qkv", (own_q, own_k, own_k), strict=True)]
        with mk.use_backend("triton"):
            out, lse = ops.attention(*given, causal=causal, return_lse=True)
        grads = torch.autograd.grad((out, lse), given, (upstream[None, own_q], upstream_lse[None, :, own_q]))
        assert torch.equal(packed["out"][own_q], out[0]) and torch.equal(packed["lse"][:, own_q], lse[0])
        for n, own, grad in zip("qkv", (own_q, own_k, own_k), grads, strict=True):
            assert torch.equal(packed[f"gradient of {n}"][own], grad[0]), (c, n)
    for n, own in (("q", "q"), ("k", "k"), ("v", "k")):
        assert (packed[f"gradient of {n}"][~covered[own]] == 0).all()
    assert (packed["out"][~covered["q"]] == 0).all() and (packed["lse"][:, ~covered["q"]] == -torch.inf).all()


def test_packed_against_fp64(process):
    process.submit(judge_packed).result()


def judge_packed():
    inputs = {n: t[0] for n, t in inputs_of((1, 50, 60, 2, 1, 24), F16).items()}
    bounds = {"cu_seqlens_q": torch.tensor([0, 17, 17, 40, 50]), "cu_seqlens_k": torch.tensor([0, 33, 40, 50, 60])}
    judge(inputs, causal=True, **bounds)


def test_bounds_out_of_range_are_clamped(process):
    process.submit(clamp_bounds).result()


def clamp_bounds():
    """Neighbours in memory are NaN: what was read out of bounds would show."""
    inputs = inputs_of((3, 40, 50, 1, 1, 8), F32)
    wide = {n: t.clone() for n, t in inputs.items()}
    for t in wide.values():
        t[::2] = torch.nan
    wrong = {"cu_seqlens_q": torch.tensor([-7, 20, 99]), "cu_seqlens_k": torch.tensor([-2**40, 30, 2**40])}
    right = {"cu_seqlens_q": torch.tensor([0, 20, 40]), "cu_seqlens_k": torch.tensor([0, 30, 50])}
    inputs, wide = {n: t[1] for n, t in inputs.items()}, {n: t[1] for n, t in wide.items()}
    assert_same(by("triton", wide, **wrong), by("triton", inputs, **right))
    down = {"cu_seqlens_q": torch.tensor([30, 10, 40]), "cu_seqlens_k": torch.tensor([40, 10, 50])}  # senseless, and harmless
    assert by("triton", wide, **down)["out"].shape == (40, 1, 8)
