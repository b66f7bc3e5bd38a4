"""What the Triton kernels read and write, by the interpreter: padding, NaN, views, far addresses, nothing at all."""

import importlib.util
import itertools
import mmap

import pytest
import torch
from attention_runs import BF16, F16, F32, F64, assert_same, by, inputs_of, random

import mmgen_kernels as mk
from mmgen_kernels.attn import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("D", (72, 96))
def test_keys_beyond_their_length_leave_no_trace(process, D):
    process.submit(no_trace, D).result()


def no_trace(D):
    inputs, lengths = inputs_of((3, 17, 130, 1, 1, D), BF16), torch.tensor([70, 0, 128])
    clean = by("triton", inputs, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        inputs["k"][b, length:], inputs["v"][b, length:] = torch.nan, torch.inf
    assert_same(by("triton", inputs, key_lengths=lengths), clean)
    for n in "kv":
        assert all((clean[f"gradient of {n}"][b, length:] == 0).all() for b, length in enumerate(lengths.tolist()))
    assert (clean["out"][1] == 0).all() and (clean["lse"][1] == -torch.inf).all() and (clean["gradient of q"][1] == 0).all()


def test_nan_stays_in_its_query(process):
    process.submit(nan_stays).result()


def nan_stays():
    for value in (torch.nan, torch.inf):
        inputs = inputs_of((2, 40, 33, 2, 2, 8), F32)
        clean = by("triton", inputs)
        inputs["q"][1, 36, 0, 5] = value
        spoilt = by("triton", inputs)
        there = torch.zeros(2, 40, 2, dtype=torch.bool)
        there[1, 36, 0] = True
        assert torch.equal(spoilt["out"].isnan().all(-1), there) and torch.equal(spoilt["out"].isnan().any(-1), there)
        assert torch.equal(spoilt["out"][~there], clean["out"][~there])


def test_queries_without_keys_have_no_gradient(process):
    process.submit(no_keys).result()


def no_keys():
    """Whatever comes from upstream: of lse = -inf most functions have a gradient that is not finite."""
    inputs = inputs_of((1, 17, 33, 1, 1, 8), F32) | {"bias": torch.zeros(1, 1, 17, 33)}
    inputs["bias"][..., 4, :] = -torch.inf
    given = {n: t.requires_grad_() for n, t in inputs.items()}
    with mk.use_backend("triton"):
        out, lse = ops.attention(given["q"], given["k"], given["v"], bias=given["bias"], return_lse=True)
    assert (out[0, 4] == 0).all() and lse[0, 0, 4] == -torch.inf
    upstream = torch.ones_like(lse)
    upstream[0, 0, 4] = torch.nan
    grads = torch.autograd.grad((out, lse), list(given.values()), (torch.ones_like(out), upstream))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, 4] == 0).all() and (grads[3][0, 0, 4] == 0).all()


def test_views_are_read_in_place(process):
    process.submit(views_in_place).result()


def views_in_place():
    from mmgen_kernels.attn.triton_kernels import tiles

    B, T, H, D = 2, 33, 2, 24
    qkv = random(B, T, 3, H, D, seed=1, dtype=BF16)
    uneven = random(B, T, 3, H, D + 5, seed=1, dtype=BF16)[..., 3 : D + 3]
    by_head = random(3, B, H, T, D, seed=1, dtype=BF16).transpose(2, 3)
    spread = random(B, T, 3, H, D, 2, seed=1, dtype=BF16)[..., 0]
    for views, unit in ((qkv.unbind(2), 8), (uneven.unbind(2), 1), (by_head.unbind(0), 8), (spread.unbind(2), None)):
        if unit is not None:
            assert all(tiles.dense_rows(t) is t for t in views) and tiles.unit_of(*views) == unit
        before = [t.clone() for t in views]
        inputs = dict(zip("qkv", views, strict=True))
        assert_same(by("triton", inputs), by("triton", {n: t.contiguous() for n, t in inputs.items()}))
        assert all(torch.equal(a, b) for a, b in zip(before, views, strict=True))
    one = random(1, 1, 1, D, seed=1).as_strided((1, 1, 1, D), (7, 5, 3, 1))
    assert tiles.unit_of(one) == 8


def test_addresses_beyond_32_bits(process):
    process.submit(far_apart).result()


def far_apart():
    """Samples, heads or tokens 4 GiB apart, in memory that is never touched between them."""
    B, T, H, D = 2, 2, 2, 8
    far = 2**31 + 8  # as a number of 16 bytes it fits 32 bits

    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + B * T * H * D), flags=flags), dtype=F16)
    dense = random(B, T, H, D, seed=1, dtype=F16)
    for strides in ((far, H * D, D, 1), (T * D, D, far, 1), (H * D, far, D, 1)):
        view = memory.as_strided(dense.shape, strides)
        view.copy_(dense)
        assert_same(by("triton", dict.fromkeys("qkv", view)), by("triton", dict.fromkeys("qkv", dense)))


def test_empty_inputs(process):
    process.submit(nothing_to_do).result()


def nothing_to_do():
    for dims in ((2, 0, 5, 2, 1, 8), (2, 5, 0, 2, 1, 8), (0, 5, 5, 2, 1, 8)):
        inputs = inputs_of(dims, F16)
        assert_same(by("triton", inputs), by("reference", inputs))
    assert (by("triton", inputs_of((2, 5, 0, 2, 1, 8), F16))["lse"] == -torch.inf).all()
    wide = inputs_of((1, 5, 9, 2, 1, 8), F64)
    assert_same(by("triton", wide), by("reference", wide))


def test_a_gradient_that_nobody_needs_is_empty(process):
    process.submit(only_what_is_needed).result()


def only_what_is_needed():
    inputs = inputs_of((1, 17, 33, 2, 1, 8), F32, (1, 1, 17, 33))
    given = (*inputs.values(), None, None, None)
    out, lse = torch.ops.mmgen_kernels.attention.triton(*given, True, 0.3, True)
    upstream, upstream_lse = random(*out.shape, seed=11), random(*lse.shape, seed=12)
    backward = torch.ops.mmgen_kernels.attention_backward
    for needs in itertools.product((True, False), repeat=4):
        for grads in ((upstream, None), (None, upstream_lse), (upstream.sum().expand_as(upstream), upstream_lse)):
            request = (*grads, *given, out, lse, True, 0.3, True, *needs)
            for ours, plainly in zip(backward.triton(*request), backward.reference(*request), strict=True):
                assert ours.shape == plainly.shape and ours.dtype == plainly.dtype
                assert torch.allclose(ours, plainly, rtol=1e-4, atol=1e-5)


def test_opcheck(process):
    process.submit(check_operators).result()


def check_operators():
    inputs = {n: t.requires_grad_() for n, t in inputs_of((1, 5, 9, 2, 1, 8), F32, (1, 1, 5, 9)).items()}
    torch.library.opcheck(torch.ops.mmgen_kernels.attention.triton, (*inputs.values(), None, None, None, True, 0.3, True))
