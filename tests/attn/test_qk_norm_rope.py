"""qk_norm_rope and rope_table beyond the battery: formulas by hand, gradcheck, what autograd may ask, determinism, rounding."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.attn.qk_norm_rope import AFFINE, TABLES, Inputs, call
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits

CPU = torch.device("cpu")
IMPLEMENTATIONS = battery.implementations("qk_norm_rope", CPU)
SMALL = Inputs(B=2, T=5, H=3, G=2, D=8, biases=True)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def made(inputs=SMALL, dtype=torch.float32):
    t = inputs(CPU, (dtype,))
    return {n: v if n in TABLES else v.requires_grad_() for n, v in t.items()}


def weighted(outputs):
    """A sum of all outputs in which every element has its own weight."""
    return sum((v * torch.linspace(-1, 2, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in outputs.values())


def gradients(t, options, of=None):
    return torch.autograd.grad(weighted(of or call(t, options)), [v for v in t.values() if v.requires_grad])


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- values -----------------------------------------------------------------------------------------------------------


def test_norms_by_hand(implementation):
    q, k = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2), torch.tensor([[2.0, -2.0], [0.0, 4.0]]).view(1, 1, 2, 2)
    rms = torch.tensor([1.0, 3.0]) / math.sqrt(5), torch.tensor([[1.0, -1.0], [0.0, math.sqrt(2)]])
    for got, expected in zip(mk.qk_norm_rope(q, k, eps=0.0), rms, strict=True):
        torch.testing.assert_close(got, expected.view(got.shape))
    weight, bias = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -0.5])
    _, got = mk.qk_norm_rope(q, k, norm="layer", k_weight=weight, k_bias=bias, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([[2.5, -3.5], [-1.5, 2.5]]).view(1, 1, 2, 2))  # (1, -1) and (-1, 1) before
    _, got = mk.qk_norm_rope(q, k, across_heads=True, eps=0.0, k_weight=torch.arange(1.0, 5.0))
    torch.testing.assert_close(got.flatten(), torch.tensor([2.0, -4.0, 0.0, 16.0]) / math.sqrt(6))
    _, got = mk.qk_norm_rope(q, k, norm="layer", across_heads=True, eps=0.25)
    torch.testing.assert_close(got.flatten(), torch.tensor([1.0, -3.0, -1.0, 3.0]) / math.sqrt(5.25))


def test_angles_by_hand(implementation):
    """A quarter turn of the first pair, half a turn of the second, and a channel that passes."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    cos, sin = torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    q, k = mk.qk_norm_rope(x, 10 * x, norm=None, cos=cos, sin=sin, interleaved=True)
    assert q.flatten().tolist() == [-2.0, 1.0, -3.0, -4.0, 5.0] and torch.equal(k, 10 * q)
    q, k = mk.qk_norm_rope(x, 10 * x, norm=None, cos=cos, sin=sin)
    assert q.flatten().tolist() == [-3.0, -2.0, 1.0, -4.0, 5.0] and torch.equal(k, 10 * q)


@pytest.mark.parametrize("dims", ((8,), (2, 4), (2, 4, 2)))
def test_rope_table_by_hand(dims):
    positions = torch.tensor([[0, 5, 2], [3, 1, 70000]])[:, : len(dims)]
    cos, sin = mk.rope_table(positions, dims, theta=100.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (2, sum(dims) // 2)
    for row in range(2):
        angles = [int(positions[row, a]) / 100.0 ** (2 * i / dim) for a, dim in enumerate(dims) for i in range(dim // 2)]
        assert torch.equal(cos[row], torch.tensor([math.cos(a) for a in angles], dtype=torch.float64).float())
        assert torch.equal(sin[row], torch.tensor([math.sin(a) for a in angles], dtype=torch.float64).float())


def test_rope_table_of_samples_and_bases():
    positions = torch.arange(24).view(2, 6, 2) / 2
    cos, sin = mk.rope_table(positions, (4, 6), theta=(10.0, 1e4), dtype=torch.float64)
    assert cos.shape == (2, 6, 5)
    for b in range(2):
        parts = [
            mk.rope_table(positions[b, :, a : a + 1], (d,), theta, dtype=torch.float64)
            for a, (d, theta) in enumerate(((4, 10), (6, 1e4)))
        ]
        assert torch.equal(cos[b], torch.cat([p[0] for p in parts], -1)) and torch.equal(
            sin[b], torch.cat([p[1] for p in parts], -1)
        )


@pytest.mark.parametrize("interleaved", (False, True))
def test_scores_depend_on_distances_alone(implementation, interleaved):
    """What rotary embedding is for: moving every token by as much leaves each product of a query and a key."""
    q, k = randn(1, 9, 2, 16, seed=1), randn(1, 9, 2, 16, seed=2)

    def scores(first):
        cos, sin = mk.rope_table(first + torch.arange(9)[:, None], (16,), dtype=torch.float64)
        return torch.einsum("bthd,bshd->bhts", *mk.qk_norm_rope(q, k, cos=cos, sin=sin, interleaved=interleaved))

    torch.testing.assert_close(scores(0), scores(1000))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("across", (False, True))
def test_the_result_is_rounded_once(implementation, dtype, across):
    t = {n: v if n in TABLES else v.to(dtype) for n, v in SMALL.but(across=across, D=72)(CPU, (torch.float32,)).items()}
    wide = {n: v.float() for n, v in t.items()}
    for norm in ("rms", "layer"):
        options = {"norm": norm, "across_heads": across, "interleaved": True}
        assert_same(call(t, options).values(), [v.to(dtype) for v in call(wide, options).values()])


def test_without_a_norm_what_is_not_turned_keeps_its_bits(implementation):
    x = torch.tensor([0.0, -0.0, 1e-30, -1.5, 3e38, 7.0, -0.0, 0.0]).view(1, 1, 1, 8)
    cos, sin = torch.ones(1, 1), torch.zeros(1, 1)
    q, k = mk.qk_norm_rope(x, x, norm=None, cos=cos, sin=sin)
    assert same_bits(q[..., 2:], x[..., 2:]) and same_bits(k[..., 2:], x[..., 2:])
    assert_same(mk.qk_norm_rope(x, x, norm=None), (x, x))


@pytest.mark.parametrize("norm", ("rms", "layer"))
@pytest.mark.parametrize("across", (False, True))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_values_that_are_not_finite_stay_in_their_row(implementation, norm, across, value):
    t = {n: v.detach() for n, v in made(SMALL.but(across=across)).items()}
    options = {"norm": norm, "across_heads": across}
    clean = call(t, options)
    for name in "qk":
        spoiled = t | {name: t[name].clone()}
        spoiled[name][1, 3, 1, 2] = value
        got = call(spoiled, options)
        others = torch.ones(got[name].shape[:3], dtype=torch.bool)
        others[1, 3, slice(None) if across else 1] = False
        assert same_bits(got[name][others], clean[name][others])
        assert not got[name][1, 3, 1, 2].isfinite() and not got[name][1, 3, 1, 6].isfinite()  # its pair: 4 apart
        if norm == "layer" or math.isnan(value):
            assert got[name][~others].isnan().all()
        other = "k" if name == "q" else "q"
        assert same_bits(got[other], clean[other])


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("across", (False, True))
@pytest.mark.parametrize("norm", ("rms", "layer", None))
def test_gradcheck(implementation, norm, across, interleaved):
    if norm is None and across:
        return
    plain = norm is None
    for P, per_sample in ((0, False), (2, True), (3, False)):
        inputs = SMALL.but(T=3, D=6, P=P, per_sample=per_sample, across=across, weights=not plain, biases=not plain)
        t = made(inputs, torch.float64)
        options = {"norm": norm, "across_heads": across, "eps": 0.1, "interleaved": interleaved}
        names = [n for n in t if n not in TABLES]

        def function(*values, t=t, names=names, options=options):
            return tuple(call(t | dict(zip(names, values, strict=True)), options).values())

        assert torch.autograd.gradcheck(function, tuple(t[n] for n in names))


@pytest.mark.parametrize("across", (False, True))
def test_only_what_is_needed_is_differentiated(implementation, across):
    """Each input alone gets the gradient that it gets among all."""
    t, options = made(SMALL.but(across=across)), {"norm": "layer", "across_heads": across}
    wanted = [n for n in t if n not in TABLES]
    expected = dict(zip(wanted, gradients(t, options), strict=True))
    for name in wanted:
        alone = {n: v.detach().requires_grad_(n == name) for n, v in t.items()}
        outputs = {n: v for n, v in call(alone, options).items() if n == name[0]}
        weights = {n: v for n, v in call(t, options).items() if n == name[0]}
        (found,) = torch.autograd.grad(weighted(outputs), alone[name])
        assert same_bits(found, torch.autograd.grad(weighted(weights), t[name])[0]), name
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("across", (False, True))
def test_an_output_that_nobody_differentiates(implementation, across):
    """What only k depends on has the gradient 0."""
    t, options = made(SMALL.but(across=across)), {"across_heads": across}
    found = torch.autograd.grad(weighted({"q": call(t, options)["q"]}), [t[n] for n in ("q", "k", *AFFINE)])
    for name, gradient in zip(("q", "k", *AFFINE), found, strict=True):
        assert bool(gradient.any()) == (name[0] == "q"), name


@pytest.mark.parametrize("across", (False, True))
def test_upstream_gradients_of_any_layout(implementation, across):
    t, options = made(SMALL.but(across=across)), {"across_heads": across, "interleaved": True}
    outputs, leaves = list(call(t, options).values()), [t[n] for n in ("q", "k", *AFFINE)]
    dense = [randn(*v.shape, seed=50 + i).float() for i, v in enumerate(outputs)]
    expected = torch.autograd.grad(outputs, leaves, dense, retain_graph=True)
    for order in itertools.permutations(range(4)):
        back = [order.index(i) for i in range(4)]
        given = [g.permute(order).contiguous().permute(back) for g in dense]
        assert_same(torch.autograd.grad(outputs, leaves, given, retain_graph=True), expected)
    stretched = [g[:1, :1, :1, :1].expand(g.shape) for g in dense]
    found = torch.autograd.grad(outputs, leaves, stretched, retain_graph=True)
    assert_same(found, torch.autograd.grad(outputs, leaves, [g.contiguous() for g in stretched]))


def test_views_of_the_projection_are_what_is_kept(implementation):
    """Neither forward nor backward copies q and k, and results are tensors of their own."""
    qkv = torch.randn(2, 5, 3, 3, 8, requires_grad=True)
    q, k, _ = qkv.unbind(2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = mk.qk_norm_rope(q, k)
    assert sorted(t.data_ptr() for t in kept if t.numel()) == sorted((q.data_ptr(), k.data_ptr()))
    assert all(v.is_contiguous() for v in outputs) and outputs[0].data_ptr() != q.data_ptr()
    (of_qkv,) = torch.autograd.grad(weighted(dict(zip("qk", outputs, strict=True))), qkv)
    dense = [t.detach().contiguous().requires_grad_() for t in (q, k)]
    expected = torch.autograd.grad(weighted(dict(zip("qk", mk.qk_norm_rope(*dense), strict=True))), dense)
    assert_same(of_qkv.unbind(2)[:2], expected)


def test_inference_mode_and_checkpoint(implementation):
    t, options = made(), {}
    outputs, expected = call(t, options), gradients(t, options)
    with torch.inference_mode():
        assert_same(call(t, options).values(), outputs.values())
    with torch.no_grad():
        assert not any(v.requires_grad for v in call(t, options).values())
    assert_same(gradients(t, options, checkpoint(lambda: call(t, options), use_reentrant=False)), expected)


def test_second_derivative_is_refused(implementation):
    t = made()
    (g,) = torch.autograd.grad(weighted(call(t, {})), t["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="qk_norm_rope_backward has no derivative; the operator is differentiable once"):
        g.sum().backward()


# -- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("across", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_same_bits_in_twenty_runs_on_any_number_of_threads(implementation, across, dtype):
    """Large enough that the work is split, and T is off every piece of it."""
    t = made(Inputs(B=3, T=257, H=4, G=3, D=72, across=across, biases=True), dtype)
    options = {"norm": "layer", "across_heads": across}
    outputs, expected = call(t, options), gradients(t, options)
    for run in range(20):
        torch.set_num_threads(1 + run % 3)
        again = call(t, options)
        assert_same(again.values(), outputs.values())
        assert_same(gradients(t, options, again), expected)


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 4), T=st.integers(1, 70), H=st.integers(1, 5), G=st.integers(1, 5), D=st.integers(1, 40),
    P=st.integers(0, 20), norm=st.sampled_from(("layer", "rms", None)), across=st.booleans(), interleaved=st.booleans(),
    sample=st.integers(0, 3), token=st.integers(0, 69),
)  # fmt: skip
def test_a_token_does_not_depend_on_its_batch(B, T, H, G, D, P, norm, across, interleaved, sample, token):
    """Nor does a head of its neighbours, where each has its own norm. Any sizes, and equal to the reference."""
    sample, token, P, across = sample % B, token % T, min(P, D // 2), across and norm is not None
    inputs = Inputs(B=B, T=T, H=H, G=G, D=D, P=P, weights=norm is not None, across=across)
    t, options = inputs(CPU, (torch.float32,)), {"norm": norm, "across_heads": across, "interleaved": interleaved}
    expected = mk.qk_norm_rope(**{n: v.double() for n, v in t.items()}, **options)
    for implementation in IMPLEMENTATIONS:
        with mk.use_backend(implementation):
            whole = call(t, options)
            for a, b in zip(whole.values(), expected, strict=True):
                torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-5)
            own = {n: v[sample : sample + 1, token : token + 1] for n, v in t.items() if n in "qk"}
            own |= {n: v[token : token + 1] for n, v in t.items() if n in TABLES}
            alone = call(t | own, options)
            assert_same(alone.values(), [v[sample : sample + 1, token : token + 1] for v in whole.values()])
            if not across:
                one = call(t | {n: t[n][:, :, -1:] for n in "qk"}, options)
                assert_same(one.values(), [v[:, :, -1:] for v in whole.values()])
