"""Tiles by tensor descriptors, by the interpreter: the bits that tiles by addresses give, and who gets which."""

import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch
from attention_runs import BF16, F16, assert_same, inputs_of, random

import mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.attn import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
LONG = pytest.mark.long

CASES = {
    # B, T, S, H, G, D
    "DiT": {"dims": (2, 65, 130, 2, 2, 72), "dtype": BF16},
    "one query": {"dims": (1, 1, 129, 2, 1, 24), "dtype": F16},
    "one key": {"dims": (2, 17, 1, 2, 2, 72), "dtype": F16},
    "group": {"dims": (2, 33, 130, 4, 2, 80), "dtype": BF16},
    "causal": {"dims": (2, 130, 130, 2, 1, 72), "dtype": BF16, "causal": True},
    "causal, more keys": {"dims": (1, 70, 200, 1, 1, 80), "dtype": F16, "causal": True},
    "negative scale": {"dims": (1, 17, 70, 1, 1, 24), "dtype": F16, "scale": -0.5},
    "lengths": {"dims": (5, 17, 150, 1, 1, 72), "dtype": BF16, "lengths": (70, 0, 128, 150, 1)},
    "lengths, causal, group": {"dims": (3, 70, 150, 4, 2, 80), "dtype": BF16, "lengths": (65, 64, 150), "causal": True},
    "bias": {"dims": (1, 33, 130, 2, 1, 72), "dtype": BF16, "bias": (1, 2, 33, 130)},
    "32 keys a step": {"dims": (1, 65, 70, 1, 1, 256), "dtype": BF16, "causal": True},
}


def by_each_way(q, k, v, **options):
    """way -> out, lse, how the kernel was launched: (descriptors, specialised warps), and what was warned."""
    from mmgen_kernels.attn.triton_kernels import descriptors, forward

    kernel, found = forward.attention_forward, {}
    for way in ("pointers", "descriptors", "warp_specialized"):
        launches = []

        class Watched:
            warmup = kernel.warmup

            def __getitem__(self, grid, launches=launches):
                def launch(*args, **constants):
                    boxes = args[-len(descriptors.NO_BOXES) :]
                    launches.append((all(box is not None for box in boxes[::2]), constants["SPECIALIZED"]))
                    return kernel[grid](*args, **constants)

                return launch

        descriptors._told.clear()
        patch = pytest.MonkeyPatch()
        patch.setattr(forward, "attention_forward", Watched())
        patch.setattr(backends, "triton_attention", way)
        with patch.context(), mk.use_backend("triton"), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            out, lse = ops.attention(q, k, v, return_lse=True, **options)
        patch.undo()
        (launched,) = launches
        results = {"out": out, "lse": lse}
        results |= {f"NaN of {n}": t.isnan() for n, t in results.items()}
        results = {n: t.nan_to_num() if t.is_floating_point() else t for n, t in results.items()}
        found[way] = results, launched, [str(w.message) for w in told if "specialised" in str(w.message)]
    return found


def assert_same_bits(q, k, v, specializes=False, served=True, **options):
    found = by_each_way(q, k, v, **options)
    expected, launched, told = found["pointers"]
    assert launched == (False, False) and told == []
    by_descriptors, launched, told = found["descriptors"]
    assert launched == (served, False) and told == []
    assert_same(by_descriptors, expected)
    specialized, launched, told = found["warp_specialized"]
    assert launched == (served, specializes) and (told == []) == specializes, told
    assert_same(specialized, expected)
    return expected, told


def packed_projection(B, T, S, H, G, D, dtype):
    """Views of a projection, as models have them: strides of heads and tokens that are not those of a tensor of their own."""
    q = random(B, T, 3, H, D, seed=1, dtype=dtype)[:, :, 1]
    return q, *random(B, S, 2, G, D, seed=2, dtype=dtype).unbind(2)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_by_addresses(process, name):
    process.submit(same_bits, **CASES[name]).result()


def same_bits(dims, dtype, lengths=None, bias=None, **options):
    q, k, v = packed_projection(*dims, dtype)
    if lengths is not None:  # beyond them NaN, which is loaded with the rows that are whole tiles of nobody else
        options["key_lengths"] = torch.tensor(lengths)
        for b, length in enumerate(lengths):
            k[b, length:], v[b, length:] = torch.nan, torch.nan
    if bias is not None:
        options["bias"] = random(*bias, seed=4)
    expected, told = assert_same_bits(q, k, v, specializes=lengths is None and bias is None, **options)
    assert not expected["NaN of out"].any()
    if lengths is not None:
        assert "ends with its tensor, not with its sequence" in told[0]


@pytest.mark.parametrize("causal", (False, pytest.param(True, marks=LONG)))
def test_same_bits_of_packed_sequences(process, causal):
    process.submit(same_bits_packed, causal).result()


def same_bits_packed(causal):
    """A sequence's neighbours are NaN: a tile that took their rows for its own would show."""
    lengths_q, lengths_k = (65, 0, 1, 33), (70, 5, 64, 129)
    starts_q, starts_k = (torch.tensor([3, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, k, v = (t[0] for t in packed_projection(1, int(starts_q[-1]) + 2, int(starts_k[-1]) + 5, 2, 1, 72, BF16))
    for t, starts in ((q, starts_q), (k, starts_k), (v, starts_k)):
        t[: starts[0]], t[starts[-1] :] = torch.nan, torch.nan
    k[starts_k[2] : starts_k[3]] = torch.nan
    v[starts_k[2] : starts_k[3]] = torch.nan
    expected, _ = assert_same_bits(q, k, v, causal=causal, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    for c in range(4):
        assert expected["NaN of out"][starts_q[c] : starts_q[c + 1]].any() == (c == 2)


def test_who_has_no_descriptors(process):
    process.submit(no_descriptors).result()


def no_descriptors():
    q, k, v = inputs_of((2, 17, 70, 2, 1, 24), F16).values()
    uneven = random(2, 70, 1, 24 + 4, seed=3, dtype=F16)[..., 4:]
    repeated = k[:, :1].expand(2, 70, 1, 24)
    for way in ((q.float(), k.float(), v.float()), (q, uneven, v), (q, repeated, v), (q, k, torch.cat([v, v], -1)[..., 4:28])):
        _, told = assert_same_bits(*way, served=False)
        assert len(told) == 1
    many = inputs_of((1, 17, 70, 1, 1, 104), F16).values()
    assert "more than 2 tiles" in assert_same_bits(*many, served=False)[1][0]
    nothing = (q, k[:, :0], v[:, :0])
    assert_same_bits(*nothing, served=False)


def test_reasons():
    from mmgen_kernels.attn.triton_kernels.descriptors import reason_against_descriptors, reason_against_specialization
    from mmgen_kernels.attn.triton_kernels.tiles import head_tiles

    q, k, v = inputs_of((2, 17, 70, 2, 1, 72), BF16).values()
    for capability, served in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), True)):
        assert (reason_against_descriptors(q, k, v, head_tiles(72), capability) == "") == served
    for capability, served in (((9, 0), True), ((10, 3), True), ((12, 0), False)):
        assert (reason_against_specialization(None, None, None, capability) == "") == served
    one = q.as_strided((1, 1, 1, 72), (7, 5, 3, 1))  # alone in its dimensions
    assert reason_against_descriptors(one, one, one, head_tiles(72), (9, 0)) == ""


def test_a_compiler_that_gives_up_is_told_once(process):
    process.submit(gives_up).result()


def gives_up():
    from mmgen_kernels.attn.triton_kernels import descriptors, forward

    q, k, v = inputs_of((1, 17, 70, 1, 1, 24), F16).values()
    kernel, asked = forward.attention_forward, []

    class Refusing:
        def warmup(self, *args, **options):
            asked.append(options["SPECIALIZED"])
            raise RuntimeError("PassManager::run failed")

        def __getitem__(self, grid):
            return kernel[grid]

    patch = pytest.MonkeyPatch()
    patch.setattr(forward, "attention_forward", Refusing())
    patch.setattr(descriptors, "_refusals", {})
    patch.setattr(backends, "triton_attention", "warp_specialized")
    descriptors._told.clear()
    with patch.context(), mk.use_backend("triton"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        outs = [ops.attention(q, k, v) for _ in range(2)]
    patch.undo()
    with mk.use_backend("triton"):
        assert all(torch.equal(out, ops.attention(q, k, v)) for out in outs)
    assert asked == [True]
    (message,) = (str(w.message) for w in told)
    assert "does not compile it: PassManager::run failed" in message


def test_an_unknown_way_is_refused():
    environment = os.environ | {"MMGEN_KERNELS_TRITON_ATTENTION": "magic"}
    done = subprocess.run([sys.executable, "-c", "import mmgen_kernels"], capture_output=True, text=True, env=environment)
    assert "must be one of descriptors, pointers, warp_specialized, got 'magic'" in done.stderr
