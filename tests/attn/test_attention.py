"""attention beyond the battery: gradcheck, torch's own, rows without keys, steep logits, bits, NaN, memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.attn.attention import CROSS, KEY_LENGTHS, PACKED
from mmgen_kernels.battery.attn.data import BF16, FP16, FP32, FP64, Inputs, masked_bias, padding_of_nan, steep
from mmgen_kernels.battery.attn.law import FLOATS
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits

CPU = torch.device("cpu")
IMPLEMENTATIONS = battery.implementations("attention", CPU)
OURS = [i for i in IMPLEMENTATIONS if i in ("cpp", "triton")]  # whose bits depend on nothing around a row
SMALL = Inputs(T=5, S=6, D=8, B=2, H=2, G=1)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


@pytest.fixture(params=OURS or [pytest.param(None, marks=pytest.mark.skip(reason="the C++ part is not built"))])
def ours(request):
    with mk.use_backend(request.param):
        yield request.param


def leaves(t):
    """The same tensors, of which the floats want a gradient."""
    return {n: v.detach().requires_grad_() if n in FLOATS else v for n, v in t.items()}


def both(t, upstream=None, **options):
    """out, lse and the gradients by name. Upstream gradients have a value for each element, not of its place in the batch."""
    t = leaves(t)
    out, lse = mk.attention(**t, **options, return_lse=True)
    weights = (out.detach().float().sin() + 0.5, lse.detach().sin().nan_to_num()) if upstream is None else upstream
    names = [n for n in FLOATS if n in t]
    grads = torch.autograd.grad((out, lse), [t[n] for n in names], (weights[0].to(out), weights[1].to(lse)))
    return {"out": out.detach(), "lse": lse.detach()} | {f"grad_{n}": g for n, g in zip(names, grads, strict=True)}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(got[name], value), name


# -- values and gradients ---------------------------------------------------------------------------------------------

CHECKED = {
    "plain": (SMALL, {}),
    "causal": (SMALL, {"causal": True}),
    "more_queries_causal": (SMALL.but(T=6, S=3), {"causal": True, "scale": 0.7}),
    "grouped": (SMALL.but(H=4, G=2), {}),
    "bias": (SMALL.but(bias="bhts"), {}),
    "bias_shared": (SMALL.but(bias="hs"), {"causal": True}),
    "key_lengths": (SMALL.but(key_lengths=(4, 1)), {}),
    "packed": (SMALL.but(T=7, S=8, bounds_q=(0, 1, 5, 7), bounds_k=(0, 3, 7, 8)), {}),
    "packed_causal": (SMALL.but(T=7, S=8, bounds_q=(0, 1, 5, 7), bounds_k=(0, 3, 7, 8)), {"causal": True}),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(implementation, name):
    inputs, options = CHECKED[name]
    t = leaves(inputs(CPU, (FP64,)))
    floats = [n for n in FLOATS if n in t]

    def function(*values):
        return tuple(mk.attention(**(t | dict(zip(floats, values, strict=True))), **options, return_lse=True))

    assert torch.autograd.gradcheck(function, tuple(t[n] for n in floats))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("axes", (None, "bhts", "ts"))
@pytest.mark.parametrize(("T", "S"), ((5, 6), (6, 3), (1, 70)))
def test_it_is_scaled_dot_product_attention(implementation, causal, axes, T, S):
    t = leaves(SMALL.but(T=T, S=S, H=4, G=2, bias=axes)(CPU, (FP64,)))
    mask = t.get("bias")
    if causal and mask is not None:  # torch refuses both at once
        mask = mask.masked_fill(torch.ones(T, S).tril() == 0, -torch.inf)
    q, k, v = (t[n].transpose(1, 2) for n in "qkv")
    stock = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, enable_gqa=True).transpose(1, 2)
    out = mk.attention(**t, causal=causal)
    torch.testing.assert_close(out, stock, rtol=1e-12, atol=1e-12)
    wanted, upstream = [t[n] for n in FLOATS if n in t], randn(*out.shape, seed=5)
    for a, b in zip(*(torch.autograd.grad(o, wanted, upstream) for o in (out, stock)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_formula_by_hand(implementation):
    """Two keys with logits 0 and log 3 have weights 1/4 and 3/4 and lse log 4; alone the first has weight 1 and lse 0."""
    q, k, v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    q[..., 0], k[0, 1, 0, 0], v[0, 0, 0, 0], v[0, 1, 0, 0] = 2.0, torch.tensor(3.0).log(), 4.0, 8.0
    out, lse = mk.attention(q, k, v, scale=0.5, causal=True, return_lse=True)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([4.0, 7.0]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([1.0, 4.0]).log())
    out, lse = mk.attention(q, k, v, scale=0.5, key_lengths=torch.tensor([1]), return_lse=True)
    assert torch.equal(out[0, :, 0, 0], torch.tensor([4.0, 4.0])) and not lse.any()
    bounds = torch.tensor([0, 1, 2])
    out = mk.attention(q[0], k[0], v[0], scale=0.5, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    assert torch.equal(out[:, 0, 0], torch.tensor([4.0, 8.0]))


def test_only_what_is_needed_is_differentiated(implementation):
    """Each input alone gets the gradient that it gets among all."""
    t = leaves(SMALL.but(bias="hts", key_lengths=(4, 1))(CPU, (FP32,)))
    names = [n for n in FLOATS if n in t]
    expected = torch.autograd.grad(mk.attention(**t).square().sum(), [t[n] for n in names])
    for name, slope in zip(names, expected, strict=True):
        alone = {n: v.detach().requires_grad_(n == name) if n in FLOATS else v for n, v in t.items()}
        (found,) = torch.autograd.grad(mk.attention(**alone).square().sum(), alone[name])
        torch.testing.assert_close(found, slope, msg=name)


LAYOUTS = (lambda g: g.transpose(1, 2).contiguous().transpose(1, 2), lambda g: g[:1, :1, :1, :1].expand(g.shape))


@pytest.mark.parametrize("layout", LAYOUTS, ids=("heads first", "expanded"))
def test_upstream_gradients_of_any_layout(implementation, layout):
    t = leaves(SMALL(CPU, (FP32,)))
    out = mk.attention(**t)
    upstream = layout(randn(*out.shape, seed=5).float())
    wanted = [t[n] for n in "qkv"]
    found, expected = (torch.autograd.grad(out, wanted, g, retain_graph=True) for g in (upstream, upstream.contiguous()))
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


# -- rows without keys, and steep ones ----------------------------------------------------------------------------------

BLIND = {  # inputs, and which queries (B, T) or (N,) see no key
    "key_lengths": (CROSS.but(key_lengths=KEY_LENGTHS), lambda: torch.tensor([False, True, False])[:, None].expand(3, 40)),
    "bias": (CROSS.but(bias="hts", values=masked_bias), lambda: torch.arange(40).expand(3, 40) == 0),
    "no_keys": (CROSS.but(S=0), lambda: torch.ones(3, 40, dtype=torch.bool)),
    "packed": (PACKED, lambda: (torch.arange(110) >= 108) | ((torch.arange(110) >= 1) & (torch.arange(110) < 6))),
}


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("name", BLIND)
def test_rows_without_keys(implementation, name, dtype):
    inputs, which = BLIND[name]
    t, blind = inputs(CPU, (dtype,)), which()
    given = randn(*t["q"].shape, seed=5), randn(*mk.attention(**t, return_lse=True).lse.shape, seed=6)
    r = both(t, given)
    lse = r["lse"].movedim(-1, -2)  # (B, T, H), packed (N, H)
    assert not r["out"][blind].any() and (lse[blind] == -torch.inf).all() and not r["grad_q"][blind].any()
    assert lse[~blind].isfinite().all() and all(g.isfinite().all() for n, g in r.items() if n != "lse")
    if name == "key_lengths":
        assert not any(r[n][1].any() or r[n][2, 7:].any() for n in ("grad_k", "grad_v"))
    if name == "bias":
        assert not r["grad_bias"][t["bias"] == -torch.inf].any()


@pytest.mark.parametrize("empty", ("S", "T", "B"))
@pytest.mark.parametrize("axes", ("bhts", "bht", "s", ""))
def test_gradient_of_a_bias_of_nothing(implementation, axes, empty):
    t = CROSS.but(bias=axes, **{empty: 0})(CPU, (FP32,))
    slope = both(t)["grad_bias"]
    assert slope.shape == t["bias"].shape and not slope.any()


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("low", (-1e4, -1e9, -3e38))
def test_a_finite_mask_masks(ours, low, dtype):
    """Model code writes a large number where it means -inf: no weight is left, and nothing overflows on the way there."""
    t = CROSS(CPU, (dtype,))
    mask = torch.zeros(1, 1, 40, 51)
    mask[..., 20:] = low
    expected = both(t | {"bias": mask.masked_fill(mask != 0, -torch.inf)})
    for name, value in both(t | {"bias": mask}).items():
        assert same_bits(value, expected[name]), name


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_logits_of_ten_thousand(implementation, dtype):
    t = CROSS.but(values=steep)(CPU, (dtype,))
    for name, value in both(t, scale=0.125).items():
        assert value.isfinite().all(), name


# -- bits ---------------------------------------------------------------------------------------------------------------


def of_samples(r, samples):
    return {n: v[samples] for n, v in r.items() if n != "grad_bias" or len(v) > 1}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("causal", (False, True))
def test_bits_of_a_sample(ours, causal, dtype):
    """The same in 20 runs, on any number of threads, at any place of the batch, alone, and without what it does not see."""
    t = Inputs(T=130, S=97, H=4, G=2, bias="bhts", key_lengths=(97, 5, 64))(CPU, (dtype,))
    expected = both(t, causal=causal)
    for run in range(20):
        torch.set_num_threads(1 + run % 2)
        assert_same(both(t, causal=causal), expected)
    order = torch.tensor([2, 0, 1])
    assert_same(both({n: v[order] for n, v in t.items()}, causal=causal), of_samples(expected, order))
    for sample, length in enumerate((97, 5, 64)):
        alone = {n: v[sample : sample + 1] for n, v in t.items()}
        assert_same(both(alone, causal=causal), of_samples(expected, slice(sample, sample + 1)))
        cut = {"q": alone["q"], "k": alone["k"][:, :length], "v": alone["v"][:, :length], "bias": alone["bias"][..., :length]}
        seen = of_samples(expected, slice(sample, sample + 1))
        seen |= {n: seen[n][:, :length] for n in ("grad_k", "grad_v")} | {"grad_bias": seen["grad_bias"][..., :length]}
        assert_same(both(cut, causal=causal), seen)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("lengths_q", "lengths_k"), (((1, 70, 5), (64, 66, 1)), ((17, 600, 40), (33, 300, 129))))
def test_a_packed_batch_has_the_bits_of_its_samples(ours, lengths_q, lengths_k, causal, dtype):
    bounds = {n: torch.tensor([0, *v]).cumsum(0) for n, v in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k))}
    q = randn(sum(lengths_q), 4, 72, seed=0).to(dtype)
    k, v = (randn(sum(lengths_k), 2, 72, seed=seed).to(dtype) for seed in (1, 2))
    packed = both({"q": q, "k": k, "v": v} | bounds, causal=causal)
    alone = [
        both({"q": a[None], "k": b[None], "v": c[None]}, causal=causal)
        for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    ]
    joined = {n: torch.cat([r[n][0] for r in alone], 1 if n == "lse" else 0) for n in packed}
    assert_same(packed, joined)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3), T=st.integers(0, 20), S=st.integers(0, 20), G=st.integers(1, 3), heads=st.integers(1, 2),
    D=st.sampled_from((8, 16, 24, 40, 72, 256)), causal=st.booleans(), axes=st.sampled_from((None, "bhts", "ht", "s", "")),
    dtype=st.sampled_from((FP64, FP32, BF16)), data=st.data(),
)  # fmt: skip
def test_any_shape(B, T, S, G, heads, D, causal, axes, dtype, data):
    """Near the formula in fp64, and a sample has its own bits."""
    lengths = data.draw(st.none() | st.tuples(*(st.integers(-1, S + 1) for _ in range(B))))
    t = Inputs(T, S, D, B, G * heads, G, bias=axes, key_lengths=lengths)(CPU, (dtype,))
    exact = {n: v.double() if n in FLOATS else v for n, v in t.items()}
    given_lse = randn(B, G * heads, T, seed=6)
    upstream = randn(B, T, G * heads, D, seed=5).to(dtype).double(), given_lse
    with mk.use_backend("reference"):
        truth = both(exact, upstream, causal=causal)
    tolerance = {FP64: 1e-12, FP32: 2e-5, BF16: 6e-2}[dtype]
    for implementation in IMPLEMENTATIONS:
        with mk.use_backend(implementation):
            got = both(t, upstream, causal=causal)
            for name, value in got.items():
                atol = tolerance * max(1.0, float(truth[name].nan_to_num(neginf=0).abs().max()) if value.numel() else 0.0)
                torch.testing.assert_close(value.double(), truth[name], rtol=tolerance, atol=atol, msg=f"{implementation} {name}")
            if implementation in OURS:
                last = {n: v[-1:] if n != "bias" or len(v) > 1 else v for n, v in t.items()}
                alone = both(last, tuple(g[-1:] for g in upstream), causal=causal)
                shared = {"grad_bias"} if "bias" in t and len(t["bias"]) == 1 else set()
                assert_same({n: v for n, v in alone.items() if n not in shared}, {n: got[n][-1:] for n in got.keys() - shared})


# -- NaN ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
def test_what_lies_beyond_key_lengths_leaves_no_trace(implementation, dtype):
    """NaN there: the bits are those of the clean run."""
    upstream = randn(3, 40, 4, 72, seed=5), randn(3, 4, 40, seed=6)
    dirty, clean = (CROSS.but(key_lengths=KEY_LENGTHS, values=v)(CPU, (dtype,)) for v in (padding_of_nan(KEY_LENGTHS), lambda t: t))
    assert dirty["k"].isnan().any() and not clean["k"].isnan().any()
    found = both(dirty, upstream)
    assert_same(found, both(clean, upstream))
    assert not any(found[n][b, length:].any() for n in ("grad_k", "grad_v") for b, length in enumerate(KEY_LENGTHS))


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
def test_other_sequences_leave_no_trace(ours, dtype):
    """NaN in another sequence and in tokens of none. The reference multiplies a pack as a whole, and 0 * NaN is NaN."""
    clean = PACKED(CPU, (dtype,))
    upstream = randn(110, 4, 72, seed=5), randn(4, 110, seed=6)
    dirty = {n: v.clone() for n, v in clean.items()}
    dirty["q"][75:108] = dirty["k"][90:] = dirty["v"][90:] = torch.nan  # the last sequence and what follows it
    found, expected = both(dirty, upstream), both(clean, upstream)
    for name, value in found.items():
        of_queries = name in ("out", "grad_q")
        kept = slice(0, 75) if of_queries or name == "lse" else slice(0, 90)
        a, b = (v[:, kept] if name == "lse" else v[kept] for v in (value, expected[name]))
        assert same_bits(a, b), name
        if of_queries:
            assert same_bits(value[108:], expected[name][108:])


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_a_spoiled_query_spoils_its_row_alone(implementation, dtype, value):
    t = CROSS(CPU, (dtype,))
    spoiled = t | {"q": t["q"].clone()}
    spoiled["q"][0, 3, 1, 2] = value
    upstream = randn(3, 40, 4, 72, seed=5), randn(3, 4, 40, seed=6)
    found, expected = both(spoiled, upstream), both(t, upstream)
    assert not found["out"][0, 3, 1].isfinite().any()
    others = torch.ones(3, 40, 4, dtype=torch.bool)
    others[0, 3, 1] = False
    for name in ("out", "grad_q"):
        assert same_bits(found[name][others], expected[name][others]), name
    assert same_bits(found["lse"].mT[others], expected["lse"].mT[others])
    others = torch.ones(3, 51, 4, dtype=torch.bool)
    others[0, :, 1] = False
    for name in ("grad_k", "grad_v"):
        assert same_bits(found[name][others], expected[name][others]), name


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("name", ("k", "v"))
@pytest.mark.parametrize("causal", (False, True))
def test_a_spoiled_key_spoils_the_rows_that_see_it(implementation, dtype, name, causal):
    t = CROSS.but(G=2)(CPU, (dtype,))
    spoiled = t | {name: t[name].clone()}
    spoiled[name][1, 5, 1, 2] = torch.nan
    found, expected = (mk.attention(**each, causal=causal) for each in (spoiled, t))
    seen = slice(5 if causal else 0, None)
    assert found[1, seen, 2:, 2].isnan().all() and (name == "v" or found[1, seen, 2:].isnan().all())
    others = torch.ones(3, 40, 4, dtype=torch.bool)
    others[1, :, 2:] = False
    assert same_bits(found[others], expected[others])


# -- memory -------------------------------------------------------------------------------------------------------------

MATRIX = """
import torch
import mmgen_kernels as mk
from benchmarks import memory
from benchmarks.harness import Case, Contestant

def make(*tensors):
    leaves = [t.requires_grad_() for t in tensors]
    def call():
        out = mk.attention(*leaves[:3], bias=leaves[3], causal=True)
        return out.detach(), torch.autograd.grad(out, leaves, torch.ones_like(out))
    return call

def inputs(tiny):
    T = 64 if tiny else 2048
    return dict(data=(*(torch.randn(1, T, 4, 8) for _ in "qkv"), torch.randn(4, 1, T)))

case = Case("attention", "attention", (), inputs, None, 0, 0, "copy_gb_s")
print(memory.on_cpu(case, Contestant("ours", make)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs a resettable high-water mark")
def test_no_matrix_in_memory(ours):
    """Logits (1, 4, 2048, 2048) in fp32 take 64 MiB; q, k, v, out and their gradients take 2."""
    from benchmarks import memory

    done = subprocess.run(
        [sys.executable, "-c", MATRIX],
        cwd=Path(__file__).resolve().parents[2],
        env={**memory.os.environ, **memory.ALLOCATOR, "OMP_NUM_THREADS": "1", "MMGEN_KERNELS_BACKEND": ours},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) / 2**20 < 8
