"""code_entropy beyond the battery: gradcheck, the formulas by hand, instruction sets, transforms, compilation, bad input."""

import importlib.util
import math
import os

import pytest
import torch
from torch.func import grad, vmap

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import rand, randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.vq.code_entropy import NAMES, dense, run
from mmgen_kernels.vq import ops

IMPLEMENTATIONS = battery.implementations("code_entropy", torch.device("cpu"))
HAS_PROBE = importlib.util.find_spec("mmgen_kernels._probe") is not None


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def inputs(n=11, k=7, d=5, dtype=torch.float32):
    return randn(n, d, seed=1).to(dtype).requires_grad_(), randn(k, d, seed=2).to(dtype).requires_grad_()


def loss(x, codebook, **options):
    entropies = mk.code_entropy(x, codebook, **options)
    weights = torch.linspace(-1, 2, entropies.sample_entropy.numel(), dtype=x.dtype).view_as(entropies.sample_entropy)
    return (entropies.sample_entropy * weights).sum() - 1.5 * entropies.mean_entropy.sum()


def gradients(x, codebook, **options):
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    return torch.autograd.grad(loss(x, codebook, **options), (x, codebook))


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- values -----------------------------------------------------------------------------------------------------------


def test_the_formulas_by_hand(implementation):
    """Two codes at distances 0 and 1: p = sigmoid(1 / temperature)."""
    x, codebook = torch.tensor([[0.0], [1.0], [0.5]]), torch.tensor([[0.0], [1.0]])
    p = 1 / (1 + math.exp(-2))
    binary = -p * math.log(p) - (1 - p) * math.log(1 - p)
    out = mk.code_entropy(x, codebook, temperature=0.5)
    torch.testing.assert_close(out.sample_entropy, torch.tensor([binary, binary, math.log(2)]))
    torch.testing.assert_close(out.mean_entropy, torch.tensor(math.log(2)))
    out = mk.code_entropy(x, codebook, temperature=0.5, eps=0.25, mask=torch.tensor([True, False, False]))
    torch.testing.assert_close(out.sample_entropy, torch.tensor([binary, 0.0, 0.0]))
    torch.testing.assert_close(out.mean_entropy, torch.tensor(-p * math.log(p + 0.25) - (1 - p) * math.log(1.25 - p)))


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck(implementation, metric, masked):
    x, codebook = (v.reshape(2, -1, 3).detach().requires_grad_() for v in (randn(2, 6, 3, seed=1), randn(2, 5, 3, seed=2)))
    mask = rand(2, 6, seed=3) < 0.6 if masked else None

    def function(a, b):
        return tuple(mk.code_entropy(a, b, temperature=0.7, metric=metric, eps=1e-3, mask=mask))

    assert torch.autograd.gradcheck(function, (x, codebook))


def test_gradients_at_zero_vectors_are_zero_for_cosine(implementation):
    x, codebook = inputs()
    with torch.no_grad():
        x[3], codebook[2] = 0, 0
    of_x, of_codes = gradients(x, codebook, metric="cosine")
    assert not of_x[3].any() and not of_codes[2].any() and of_x[2].all() and of_codes[3].all()
    assert mk.code_entropy(x, codebook, metric="cosine").sample_entropy[3].item() == pytest.approx(math.log(7))


def test_codes_without_any_probability(implementation):
    """0 log 0 = 0, and no gradient comes out of it."""
    x, codebook = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [40.0, 0, 0], [1.0, 0, 0]])
    out = mk.code_entropy(x, codebook)
    expected = dense(x.double(), codebook.double(), None, 1.0, "l2", 0.0)
    torch.testing.assert_close(out.mean_entropy.double(), expected[1], rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in gradients(x, codebook))


def test_no_valid_row(implementation):
    x, codebook = inputs()
    for given, mask in ((x, torch.zeros(11, dtype=torch.bool)), (x[:0], None)):
        out = mk.code_entropy(given, codebook, mask=mask)
        assert out.mean_entropy == 0 and not out.sample_entropy.any()
        assert all(not g.any() for g in torch.autograd.grad(out.mean_entropy + out.sample_entropy.sum(), (x, codebook)))


@pytest.mark.parametrize("metric", ops.METRICS)
def test_values_that_are_not_finite(implementation, metric):
    for value in (torch.nan, torch.inf, -torch.inf):
        x, codebook = inputs()
        with torch.no_grad():
            x[4, 2] = value
        out = mk.code_entropy(x, codebook, metric=metric)
        others = torch.arange(11) != 4
        assert out.sample_entropy[4].isnan() and out.sample_entropy[others].isfinite().all() and out.mean_entropy.isnan()
        masked = mk.code_entropy(x, codebook, metric=metric, mask=others)
        alone = mk.code_entropy(x[others], codebook, metric=metric)
        assert_same((masked.sample_entropy[others], masked.mean_entropy), alone)
        total = masked.sample_entropy.sum() + masked.mean_entropy
        of_x, of_codes = torch.autograd.grad(total, (x, codebook))
        assert of_x.isfinite().all() and not of_x[4].any() and of_codes.isfinite().all()


def test_large_offsets_do_not_cancel(implementation):
    """l2 does not change where x and codebook move together; in fp32 |x|^2 alone would have an error of 100."""
    x, codebook = (v.detach().round(decimals=2) for v in inputs(dtype=torch.float64))
    x, codebook = x + 2**14, codebook + 2**14
    near = mk.code_entropy((x - 2**14).float(), (codebook - 2**14).float())
    far = mk.code_entropy(x.float(), codebook.float())
    torch.testing.assert_close(far, near, rtol=0.03, atol=0.03)  # 2^14 leaves the inputs ten bits behind the point
    exact = dense(x.float().double(), codebook.float().double(), None, 1.0, "l2", 0.0, differences=True)
    torch.testing.assert_close(tuple(t.double() for t in far), exact, rtol=1e-5, atol=1e-6)


def test_only_what_is_needed_is_differentiated(implementation):
    x, codebook = inputs()
    expected = gradients(x, codebook)
    assert torch.equal(torch.autograd.grad(loss(x, codebook.detach()), x)[0], expected[0])
    assert torch.equal(torch.autograd.grad(loss(x.detach(), codebook), codebook)[0], expected[1])


def test_second_derivative_is_refused(implementation):
    x, codebook = inputs()
    (g,) = torch.autograd.grad(loss(x, codebook), x, create_graph=True)
    with pytest.raises(RuntimeError, match="code_entropy_backward has no derivative; the operator is differentiable once"):
        g.sum().backward()


def test_inputs_are_not_written(implementation):
    x, codebook = inputs()
    mask = rand(11, seed=3) < 0.7
    before = [(t.detach().clone(), t._version) for t in (x, codebook, mask)]
    loss(x, codebook, mask=mask).backward()
    for tensor, (copy, version) in zip((x, codebook, mask), before, strict=True):
        assert torch.equal(tensor.detach(), copy) and tensor._version == version


# -- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
def test_same_bits_in_every_run_on_any_number_of_threads():
    x, codebook = inputs(2500, 3000, 8)
    expected = run(mk.code_entropy, x, codebook, (randn(2500, seed=3), torch.tensor(-1.0)), NAMES)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        again = run(mk.code_entropy, x, codebook, (randn(2500, seed=3), torch.tensor(-1.0)), NAMES)
        assert all(same_bits(again[name], value) for name, value in expected.items())


def test_a_row_does_not_depend_on_its_batch():
    """Its entropy and, as far as rows do not share it, its gradient; blocks of rows meet at 1024."""
    x, codebook = inputs(1100, 70, 6)
    (whole,) = torch.autograd.grad(mk.code_entropy(x, codebook).sample_entropy.sum(), x)
    entropy = mk.code_entropy(x, codebook).sample_entropy
    for rows in (slice(0, 1), slice(17, 50), slice(1023, 1026), slice(1099, 1100)):
        part = x.detach()[rows].requires_grad_()
        alone = mk.code_entropy(part, codebook).sample_entropy
        assert torch.equal(alone, entropy[rows])
        assert torch.equal(torch.autograd.grad(alone.sum(), part)[0], whole[rows])


# -- instruction sets -------------------------------------------------------------------------------------------------

needs_probe = pytest.mark.skipif(not HAS_PROBE, reason="built without MMGEN_KERNELS_PROBE=1")


def instruction_sets():
    from mmgen_kernels import _probe

    return [name for name in ("scalar", "avx2", "avx512") if name in _probe.instruction_sets()]


@needs_probe
def test_exponential_over_its_whole_range():
    """Every exponent that scores can have: at most 2 ulp, 0 below the smallest normal number, and NaN stays NaN."""
    import numpy as np

    from mmgen_kernels import _probe

    lowest = math.log(2.0**-126)
    x = torch.cat([torch.linspace(lowest + 1e-5, 88.3, 400_001), -(2.0 ** torch.linspace(-149, 6.4, 100_001))]).float()
    x = torch.cat([x, torch.tensor([0.0, -0.0, 88.0, math.log(2) / 2, -math.log(2) / 2])])
    expected = x.double().exp()
    ulp = 2.0 ** (torch.floor(torch.log2(expected)) - 23)
    special = torch.tensor([lowest - 1e-4, -88.0, -1e4, -1e30, -torch.inf, torch.nan, 89.0, 1e30])
    for name in instruction_sets():
        found = torch.from_numpy(_probe.exponentials(x.numpy()[None], instruction_set=name))
        assert float(((found.double() - expected).abs() / ulp).max()) <= 2, name
        found = torch.from_numpy(_probe.exponentials(np.ascontiguousarray(special.numpy()[None]), instruction_set=name))
        assert not found[:5].any() and found[5].isnan() and (found[6:] > 2e38).all(), name


@needs_probe
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("sizes", ((1, 1, 1), (7, 3, 2), (33, 65, 17), (97, 200, 40), (40, 130, 70)))
def test_every_instruction_set(monkeypatch, metric, sizes):
    x, codebook = inputs(*sizes)
    upstream = randn(sizes[0], seed=8), torch.tensor(-1.25)
    options = {"temperature": float(sizes[2]), "metric": metric, "eps": 1e-5}
    exact = run(lambda a, b: dense(a, b, None, **options, differences=True), x.double(), codebook.double(), upstream, NAMES)
    results = {}
    for name in instruction_sets():
        monkeypatch.setenv("MMGEN_KERNELS_CPU", name)
        results[name] = run(lambda a, b: mk.code_entropy(a, b, **options), x, codebook, upstream, NAMES)
        for key, value in results[name].items():
            scale = float(exact[key].abs().max())
            found = float((value.double() - exact[key]).abs().max())
            assert found <= 1e-5 * scale + 1e-9, f"{name} {key}: {found}"
    if sizes == (97, 200, 40):  # they are not all one path
        assert len({value["grad_x"].numpy().tobytes() for value in results.values()}) == len(results)


# -- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ("l2", *(pytest.param(m, marks=pytest.mark.long) for m in ("cosine", "dot"))))
def test_compile_with_dynamic_shapes_and_a_change_of_rank(implementation, metric):
    compiled = torch.compile(gradients, dynamic=True, backend="aot_eager")

    def entropies(x, codebook):
        return mk.code_entropy(x, codebook, metric=metric, temperature=0.5)

    whole = torch.compile(entropies, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k in ((23, 9), (5, 9), (64, 17), (1, 1), (0, 3)):
        x, codebook = inputs(n, k, 6)
        assert_same(whole(x, codebook), entropies(x, codebook))
        assert_same(compiled(x, codebook, metric=metric), gradients(x, codebook, metric=metric))
    x, codebook = inputs(30, 9, 6)
    for leading in ((3, 10), (2, 3, 5), (30,)):
        assert_same(whole(x.view(*leading, 6), codebook), entropies(x.view(*leading, 6), codebook))


def test_other_temperatures_in_compiled_code(implementation):
    compiled = torch.compile(lambda x, c, t: mk.code_entropy(x, c, temperature=t), fullgraph=True, backend="aot_eager")
    x, codebook = inputs()
    for temperature in (0.25, 0.5, 1, 3.0):
        assert_same(compiled(x, codebook, temperature), mk.code_entropy(x, codebook, temperature=temperature))


def test_export(implementation):
    class Module(torch.nn.Module):
        def forward(self, x, codebook):
            return tuple(mk.code_entropy(x, codebook, metric="cosine", temperature=0.1))

    rows = torch.export.Dim("rows", min=2, max=4096)
    x, codebook = (v.detach() for v in inputs())
    program = torch.export.export(Module(), (x, codebook), dynamic_shapes=({0: rows}, None)).module()
    for n in (11, 40):
        x = randn(n, 5, seed=n).float()
        assert_same(program(x, codebook), Module()(x, codebook))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_changes_nothing(implementation, dtype):
    x, codebook = inputs()
    expected = mk.code_entropy(x, codebook), gradients(x, codebook)
    with torch.autocast("cpu", dtype):
        assert_same(mk.code_entropy(x, codebook), expected[0])
        assert_same(gradients(x, codebook), expected[1])


B, H, N, K, D = 3, 2, 11, 7, 5
BATCHES = {
    "x": ((N, D), (K, D), None, (0, None, None)),
    "x_last_axis": ((N, D), (K, D), None, (-1, None, None)),
    "x_rank_1": ((D,), (K, D), None, (0, None, None)),
    "codebook": ((N, D), (K, D), None, (None, 0, None)),
    "both_other_axes": ((N, D), (K, D), None, (1, 2, None)),
    "heads_x": ((H, N, D), (H, K, D), None, (0, None, None)),
    "heads_both": ((H, N, D), (H, K, D), None, (1, 2, None)),
    "mask_shared": ((N, D), (K, D), (N,), (0, None, None)),
    "mask_only": ((N, D), (K, D), (N,), (None, None, 0)),
    "mask_heads": ((H, N, D), (H, K, D), (H, N), (0, None, 1)),
    "no_rows": ((0, D), (K, D), None, (0, None, None)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_vmap_and_gradients_per_sample(implementation, name):
    *shapes, axes = BATCHES[name]

    def batched(shape, axis, seed):
        values = randn(*(() if axis is None else (B,)), *shape, seed=seed).float()
        return values if axis is None else values.movedim(0, axis)

    x, codebook = (batched(s, a, i) for i, (s, a) in enumerate(zip(shapes[:2], axes[:2], strict=True)))
    mask = None if shapes[2] is None else batched(shapes[2], axes[2], 9) > -0.5

    def entropies(a, b, m):
        return tuple(mk.code_entropy(a, b, mask=m, metric="l2", eps=1e-5))

    def slopes(a, b, m):
        return grad(lambda a, b: loss(a, b, mask=m), argnums=(0, 1))(a, b)

    for function in (entropies, slopes) if name != "no_rows" else (entropies,):
        got = vmap(function, in_dims=axes)(x, codebook, mask)
        tensors = (x, codebook, mask)
        each = [
            function(*(t.select(a, i) if t is not None and a is not None else t for t, a in zip(tensors, axes, strict=True)))
            for i in range(B)
        ]
        assert_same(got, [torch.stack(o) for o in zip(*each, strict=True)])


# -- bad input --------------------------------------------------------------------------------------------------------

X, CODES = torch.zeros(5, 4), torch.zeros(3, 4)
BAD = {
    "x_int": (X.int(), CODES, {}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int32"),
    "dim": (X, CODES[:, :3], {}, ValueError, "x and codebook must agree in D"),
    "no_codes": (X, CODES[:0], {}, ValueError, "codebook must hold 1 to"),
    "mask": (X, CODES, {"mask": torch.ones(5)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    "metric": (X, CODES, {"metric": "l1"}, ValueError, "metric must be one of l2, cosine, dot, got 'l1'"),
    "temperature_type": (X, CODES, {"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    "temperature_tensor": (X, CODES, {"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, got Tensor"),
    "temperature_zero": (X, CODES, {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    "temperature_nan": (X, CODES, {"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
    "temperature_inf": (X, CODES, {"temperature": math.inf}, ValueError, "temperature must be positive and finite, got inf"),
    "eps_type": (X, CODES, {"eps": None}, TypeError, "eps must be a number, got NoneType"),
    "eps_negative": (X, CODES, {"eps": -1e-5}, ValueError, "eps must be finite and not negative, got -1e-05"),
    "eps_inf": (X, CODES, {"eps": math.inf}, ValueError, "eps must be finite and not negative, got inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    x, codebook, others, error, message = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        mk.code_entropy(x, codebook, **others)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    if "cpp" not in IMPLEMENTATIONS:
        pytest.skip("the C++ part is not built")
    monkeypatch.setitem(os.environ, "MMGEN_KERNELS_CPU", "mmx")
    with pytest.raises(RuntimeError, match="MMGEN_KERNELS_CPU must be"):
        mk.code_entropy(X, CODES)
