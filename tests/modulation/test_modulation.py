"""The three operators beyond the battery: formulas by hand, gradcheck, what autograd may ask of them, determinism, rounding."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.modulation.data import inputs
from mmgen_kernels.battery.modulation.law import OPTIONS, call
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
IMPLEMENTATIONS = battery.implementations("gate_residual_adaln", CPU)
EVERY = "y gate shift scale shift_2 scale_2 weight bias post_weight table"
NAMES = {
    "adaln": "shift scale shift_2 scale_2 weight bias table",
    "gate_residual": "y gate post_weight table",
    "gate_residual_adaln": EVERY,
}
LUMINA = {"gate_fn": "tanh", "post_norm": "rms", "norm": "rms"}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def made(operator, shape=(3, 6, 8), dtype=torch.float32, address="sample", **changed):
    """Tensors with gradients, and options: those of `operator` out of all that are given."""
    t = inputs(NAMES[operator], shape, address)(CPU, (dtype,))
    t = {n: v if n == "rows" else v.requires_grad_() for n, v in t.items()}
    return t, OPTIONS[operator] | {n: v for n, v in changed.items() if n in OPTIONS[operator]}


def weighted(outputs):
    """A sum of all outputs in which every element has its own weight."""
    return sum((v * torch.linspace(-1, 2, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in outputs.values())


def gradients(operator, t, options, of=None):
    leaves = [v for n, v in t.items() if v.requires_grad]
    return torch.autograd.grad(weighted(of or call(operator, t, options)), leaves)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- values -----------------------------------------------------------------------------------------------------------


def test_the_formulas_by_hand(implementation):
    x = torch.tensor([[[1.0, 3.0]], [[2.0, -2.0]], [[0.0, 4.0]]])  # means 2, 0, 2; deviations 1, 2, 2
    n = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]], [[-1.0, 1.0]]])
    shift, scale = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    torch.testing.assert_close(mk.adaln(x, None, None, eps=0.0), n)
    torch.testing.assert_close(mk.adaln(x, shift, scale, eps=0.0), n * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(mk.adaln(x, None, None, eps=3.0)[0], n[0] / 2)  # 1 / sqrt(1 + 3)
    rms = x / torch.tensor([5.0, 4.0, 8.0]).sqrt()[:, None, None]
    torch.testing.assert_close(mk.adaln(x, None, None, norm="rms", eps=0.0), rms)
    weight, bias = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -0.5])
    first, second = mk.adaln(x, (shift, None), (None, scale), weight=weight, bias=bias, eps=0.0)
    torch.testing.assert_close(first, n * weight + bias + shift[:, None])
    torch.testing.assert_close(second, (n * weight + bias) * (1 + scale[:, None]))


def test_gates_by_hand(implementation):
    x, y = torch.ones(3, 2, 2), torch.tensor([3.0, 5.0]).expand(3, 2, 2)
    gate = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.25]])
    per_token = gate[:, None].expand(3, 2, 2)
    for gate_fn, g in (("identity", per_token), ("tanh", per_token.tanh()), ("sigmoid_one_minus", (1 - per_token).sigmoid())):
        torch.testing.assert_close(mk.gate_residual(x, y, gate, gate_fn=gate_fn), 1 + g * y)
    torch.testing.assert_close(mk.gate_residual(x, y, None), 1 + y)
    normed = torch.tensor([-1.0, 1.0]).expand(3, 2, 2)  # y has mean 4 and deviation 1
    weight = torch.tensor([2.0, 7.0])
    got = mk.gate_residual(x, y, gate, post_norm="layer", post_eps=0.0, post_weight=weight)
    torch.testing.assert_close(got, 1 + per_token * normed * weight)


def test_addresses_by_hand(implementation):
    """x has variance 1 and mean 0 in every token, so that adaln gives n (1 + scale): which scale, can be read off."""
    x = torch.tensor([-1.0, 1.0]).expand(3, 4, 2).contiguous()

    def scales(scale, **options):
        return mk.adaln(x, None, scale.unsqueeze(-1).expand(*scale.shape, 2).contiguous(), eps=0.0, **options)[..., 1] - 1

    samples, frames = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    tokens = torch.arange(12.0).view(3, 4)
    assert torch.equal(scales(samples), samples[:, None].expand(3, 4))
    assert torch.equal(scales(frames), frames.repeat_interleave(2, 1))
    assert torch.equal(scales(tokens), tokens)
    assert torch.equal(scales(frames[:1]), frames[:1].repeat_interleave(2, 1).expand(3, 4))  # (1, F, D)
    assert torch.equal(scales(samples[:, None]), samples[:, None].expand(3, 4))  # (B, 1, D)
    assert torch.equal(scales(samples[:1]), samples[:1, None].expand(3, 4))  # (1, D)
    assert torch.equal(scales(frames[..., None]), frames.repeat_interleave(2, 1))  # (B, F, 1, D)
    rows = torch.tensor([[2, 0, 0, 1], [-7, 99, 2, 2], [1, 1, -1, 3]])
    expected = samples[rows.clamp(0, 2)]
    assert torch.equal(scales(samples, rows=rows), expected) and torch.equal(scales(samples, rows=rows.int()), expected)
    table = torch.tensor([[10.0, 10.0]])
    assert torch.equal(scales(samples, rows=rows, table=table), expected + 10)


def test_rows_of_the_table_follow_the_vectors_given(implementation):
    """One row for each vector that is given, None counts for none."""
    x, y, D = randn(3, 5, 8, seed=1), randn(3, 5, 8, seed=2), 8
    table, zero = randn(3, D, seed=3), torch.zeros(D, dtype=torch.float64)
    first, second = mk.adaln(x, (None, zero), (zero, zero), table=table)
    torch.testing.assert_close(first, mk.adaln(x, None, table[0]))
    torch.testing.assert_close(second, mk.adaln(x, table[1], table[2]))
    residual, modulated = mk.gate_residual_adaln(x, y, zero, None, zero, table=table[:2])
    torch.testing.assert_close(residual, mk.gate_residual(x, y, table[0]))
    torch.testing.assert_close(modulated, mk.adaln(residual, None, table[1]))
    _, modulated = mk.gate_residual_adaln(x, y, None, zero, zero, table=table[:2])
    torch.testing.assert_close(modulated, mk.adaln(x + y, table[0], table[1]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_result_is_rounded_once(implementation, dtype):
    """In another dtype it is the fp32 result, rounded; so is a residual in 16 bits."""
    x, y = randn(3, 70, 40, seed=1).float(), randn(3, 70, 40, seed=2).float()
    gate, shift, scale = (randn(3, 40, seed=s).float() for s in (3, 4, 5))
    assert same_bits(mk.adaln(x, shift, scale, dtype=dtype), mk.adaln(x, shift, scale).to(dtype))
    low = x.to(dtype)
    assert same_bits(mk.adaln(low, shift, scale), mk.adaln(low.float(), shift, scale).to(dtype))
    assert same_bits(mk.gate_residual(low, y, gate), mk.gate_residual(low.float(), y, gate).to(dtype))
    residual, modulated = mk.gate_residual_adaln(x, y.to(dtype), gate, shift, scale, dtype=dtype)
    wide, expected = mk.gate_residual_adaln(x, y.to(dtype).float(), gate, shift, scale)
    assert same_bits(residual, wide) and same_bits(modulated, expected.to(dtype))


def test_rows_without_variance_are_zero(implementation):
    """The mean of equal numbers, summed and divided, is not that number: 1000.1 gave 0.12 where F.layer_norm gives 0."""
    for D in (1, 3, 72, 1152):
        for value in (0.3, 1000.1, -1e18):
            x = torch.full((3, 2, D), value)
            assert not mk.adaln(x, None, None).any()
            assert not mk.gate_residual(torch.zeros(3, 2, D), x, None, post_norm="layer").any()


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_values_that_are_not_finite_stay_in_their_token(implementation, norm, value):
    t, options = made("gate_residual_adaln", norm=norm, address="token")
    t = {n: v.detach() for n, v in t.items() if not n.startswith("post")}
    clean = call("gate_residual_adaln", t, options)
    for name in ("x", "y"):
        for channel in (0, 3):
            spoiled = t | {name: t[name].clone()}
            spoiled[name][1, 2, channel] = value
            outputs = call("gate_residual_adaln", spoiled, options)
            others = torch.ones(3, 6, dtype=torch.bool)
            others[1, 2] = False
            for n, v in outputs.items():
                assert same_bits(v[others], clean[n][others])
                assert not v[1, 2, channel].isfinite()
            if norm == "layer" or math.isnan(value):
                assert outputs["modulated"][1, 2].isnan().all()


# -- gradients --------------------------------------------------------------------------------------------------------

CHECKED = {
    "adaln": ({}, {"norm": "rms"}),
    "gate_residual": ({}, LUMINA, {"post_norm": "layer", "gate_fn": "sigmoid_one_minus"}),
    "gate_residual_adaln": ({"post_norm": "layer", "gate_fn": "sigmoid_one_minus"}, LUMINA),
}


@pytest.mark.parametrize("address", ("shared", "sample", "frame", "token", "rows", "rows shared"))
@pytest.mark.parametrize(("operator", "changed"), [(o, c) for o, several in CHECKED.items() for c in several])
def test_gradcheck(implementation, operator, changed, address):
    names = {k for k in NAMES[operator].split() if k != "post_weight" or changed.get("post_norm")} | {"x", "rows"}
    t, options = made(operator, (2, 6, 3), torch.float64, address, eps=0.1, post_eps=0.1, **changed)
    t = {n: v for n, v in t.items() if n in names}
    floats = [n for n in t if n != "rows"]

    def function(*values):
        return tuple(call(operator, t | dict(zip(floats, values, strict=True)), options).values())

    assert torch.autograd.gradcheck(function, tuple(t[n] for n in floats))


@pytest.mark.parametrize("operator", NAMES)
def test_only_what_is_needed_is_differentiated(implementation, operator):
    """Each input alone gets the gradient that it gets among all."""
    t, options = made(operator, **LUMINA)
    expected = dict(zip(t, gradients(operator, t, options), strict=True))
    for name in t:
        alone = {n: v.detach().requires_grad_(n == name) for n, v in t.items()}
        (found,) = gradients(operator, alone, options)
        assert same_bits(found, expected[name]), name


@pytest.mark.parametrize("uses", (("residual",), ("modulated",), ("modulated_2",), ("residual", "modulated_2")))
def test_outputs_that_nobody_differentiates(implementation, uses):
    """They count as zeros; what only they depend on has the gradient 0."""
    t, options = made("gate_residual_adaln", **LUMINA)

    def found(outputs, chosen):
        return torch.autograd.grad(weighted({n: outputs[n] for n in chosen}), list(t.values()), allow_unused=True)

    outputs = call("gate_residual_adaln", t, options)
    zeroed = {n: v if n in uses else v * 0 for n, v in outputs.items()}
    total = sum(
        (v * torch.linspace(-1, 2, v.numel()).view(v.shape)).sum() for n, v in zeroed.items() if n in uses
    ) + sum(v.sum() for n, v in zeroed.items() if n not in uses)  # fmt: skip
    expected = torch.autograd.grad(total, list(t.values()))
    for name, a, b in zip(t, found(call("gate_residual_adaln", t, options), uses), expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, msg=name)


def test_the_gradient_of_x_is_the_incoming_gradient_itself(implementation):
    x, y, gate = (torch.randn(3, 5, 8).requires_grad_(), torch.randn(3, 5, 8).requires_grad_(), torch.randn(3, 8))
    upstream = torch.randn(3, 5, 8)
    of_x, of_y = torch.autograd.grad(mk.gate_residual(x, y, gate), (x, y), upstream)
    assert of_x.data_ptr() == upstream.data_ptr() and of_x.shape == upstream.shape
    assert of_y.data_ptr() != upstream.data_ptr()
    of_x, of_y = torch.autograd.grad(mk.gate_residual(x, y, None), (x, y), upstream)
    of_y.add_(1)  # the gradient of y is memory of its own: to write it does not write that of x
    assert torch.equal(of_x, upstream) and torch.equal(of_y, upstream + 1)


def test_gradients_of_an_ungated_seam_are_two_tensors(implementation):
    """They are equal; one that is written, as by clipping, must leave the other."""
    x, y = torch.randn(3, 5, 8).requires_grad_(), torch.randn(3, 5, 8).requires_grad_()
    residual, modulated = mk.gate_residual_adaln(x, y, None, None, None)
    of_x, of_y = torch.autograd.grad(weighted({"r": residual, "m": modulated}), (x, y))
    assert torch.equal(of_x, of_y) and of_x.data_ptr() != of_y.data_ptr()


@pytest.mark.parametrize("operator", NAMES)
def test_upstream_gradients_of_any_layout(implementation, operator):
    t, options = made(operator, **LUMINA)
    outputs = call(operator, t, options)
    dense = [randn(*v.shape, seed=50 + i).float() for i, v in enumerate(outputs.values())]
    expected = torch.autograd.grad(list(outputs.values()), list(t.values()), dense, retain_graph=True)
    for change in (lambda g: g.mT.contiguous().mT, lambda g: g.transpose(0, 1).contiguous().transpose(0, 1), torch.Tensor.clone):
        got = torch.autograd.grad(list(outputs.values()), list(t.values()), [change(g) for g in dense], retain_graph=True)
        assert_same(got, expected)
    got = torch.autograd.grad(list(outputs.values()), list(t.values()), [g[:1, :1, :1].expand(g.shape) for g in dense])
    again = [g[:1, :1, :1].expand(g.shape).contiguous() for g in dense]
    assert_same(got, torch.autograd.grad(list(call(operator, t, options).values()), list(t.values()), again))


@pytest.mark.parametrize("operator", NAMES)
def test_expanded_inputs(implementation, operator):
    """Stride 0 in x, y and the vectors: the gradient is of the expanded tensor, its base gets the sum."""
    t, options = made(operator, **LUMINA)
    bases = {n: v.detach()[:1] for n, v in t.items() if v.dim() > 1 and n != "table"}
    stretched = {n: v.expand(3, *v.shape[1:]).requires_grad_() for n, v in bases.items()}
    dense = {n: v.detach().contiguous().requires_grad_() for n, v in stretched.items()}
    results = [(call(operator, t | v, options), v) for v in (stretched, dense)]
    assert_same(results[0][0].values(), results[1][0].values())
    assert_same(*(torch.autograd.grad(weighted(o), list(v.values())) for o, v in results))


@pytest.mark.parametrize("operator", NAMES)
def test_inference_mode_checkpoint_and_deepcopy(implementation, operator):
    t, options = made(operator, **LUMINA)
    outputs, expected = call(operator, t, options), gradients(operator, t, options)
    with torch.inference_mode():
        plain = call(operator, t, options)
    with torch.no_grad():
        assert not any(v.requires_grad for v in call(operator, t, options).values())
    assert_same(plain.values(), outputs.values())
    assert all(v.is_inference() for v in plain.values())
    found = checkpoint(lambda: call(operator, t, options), use_reentrant=False)
    assert_same(gradients(operator, t, options, found), expected)
    copied = copy.deepcopy(t)
    assert_same(gradients(operator, copied, options), expected)


@pytest.mark.parametrize("operator", NAMES)
def test_second_derivative_is_refused(implementation, operator):
    t, options = made(operator, **LUMINA)
    name = "x" if operator == "adaln" else "y"
    (g,) = torch.autograd.grad(weighted(call(operator, t, options)), t[name], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator}_backward has no derivative; the operator is differentiable once"):
        g.sum().backward()


# -- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("address", ("sample", "rows shared"))
def test_same_bits_in_every_run_on_any_number_of_threads(implementation, operator, address):
    """Large enough that torch's own operators, too, would split the work."""
    t, options = made(operator, (3, 211, 200), address=address, **LUMINA)
    outputs, expected = call(operator, t, options), gradients(operator, t, options)
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        again = call(operator, t, options)
        assert_same(again.values(), outputs.values())
        assert_same(gradients(operator, t, options, again), expected)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(3, 5), T=st.integers(1, 9), D=st.integers(1, 40), sample=st.integers(0, 2), token=st.integers(0, 8),
    gate_fn=st.sampled_from(("identity", "tanh", "sigmoid_one_minus")), norm=st.sampled_from(("layer", "rms")),
)  # fmt: skip
def test_a_token_does_not_depend_on_its_batch(B, T, D, sample, token, gate_fn, norm):
    token %= T
    for implementation in IMPLEMENTATIONS:
        with mk.use_backend(implementation):
            t, options = made("gate_residual_adaln", (B, T, D), address="token", gate_fn=gate_fn, norm=norm, post_norm=norm)
            whole = call("gate_residual_adaln", t, options)
            one = (slice(sample, sample + 1), slice(token, token + 1))
            alone = call("gate_residual_adaln", {n: v[one] if v.dim() == 3 else v for n, v in t.items()}, options)
            assert_same(alone.values(), [v[one] for v in whole.values()])


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_statistics_are_finite_where_inputs_are(implementation, operator, norm):
    """They are results of the registered operators, in fp32 whatever the dtype of x."""
    for scale in (0.0, 1e-20, 1.0, 1e4):
        x = (randn(3, 4, 40, seed=1) * scale).bfloat16()
        none, vectors = (None,) * 2, (None,) * 6
        arguments = {
            "adaln": (x, *vectors, *none, norm, 1e-6, x.dtype),
            "gate_residual": (x, x, None, *none, None, "identity", norm, 1e-6),
            "gate_residual_adaln": (x, x, None, *vectors, None, *none, "identity", norm, 1e-6, norm, 1e-6, x.dtype),
        }[operator]
        results = OPERATORS[operator](implementation, *arguments)
        for statistics in results[-1:] if operator != "gate_residual_adaln" else results[-2:]:
            assert statistics.shape == (3, 4, 2) and statistics.dtype == torch.float32 and statistics.isfinite().all()
            assert (statistics[..., 1] > 0).all() and (norm == "layer" or not statistics[..., 0].any())
