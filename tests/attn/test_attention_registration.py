"""The family with torch's machinery: opcheck, compile, export, vmap, torch.func, autocast, choice of implementation."""

import io

import pytest
import torch
import torch.nn.functional as F
from called import Called
from overloads import each_overload, with_backward
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import backends, battery
from mmgen_kernels.battery.attn.attention import PACKED
from mmgen_kernels.battery.attn.data import BF16, FP16, FP32, LAYOUTS, Inputs
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
FORWARD = OPERATORS["attention"]
IMPLEMENTATIONS = battery.implementations("attention", CPU)
HEADS, GROUPS, HEAD_DIM = 4, 2, 8
SMALL = Inputs(T=6, S=5, D=8, B=3, H=4, G=2)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- opcheck ----------------------------------------------------------------------------------------------------------

# What the operator is called with, options, and inputs that want no gradient. A packed batch is one sample there.
SAMPLES = (
    (SMALL.but(bias="bhts"), (FP32,), {}, ()),
    (SMALL.but(bias="hts", G=4, layout=LAYOUTS["heads_first"]), (BF16, FP32), {"causal": True}, ("k",)),
    (SMALL.but(layout=LAYOUTS["projection"], key_lengths=(4, 0, 9), integers=torch.int64), (FP16,), {"deterministic": False}, ()),
    (SMALL.but(T=9, S=11, bounds_q=(0, 1, 1, 8), bounds_k=(0, 4, 6, 11)), (FP32,), {"causal": True, "scale": 0.5}, ("q", "v")),
)


def samples(name):
    """Arguments that reach every branch of an operator's fake and schema. Called per overload: opcheck may keep the tensors."""
    for inputs, dtypes, changed, constant in SAMPLES:
        t = inputs(CPU, dtypes)
        if "cu_seqlens_q" in t:
            t |= {n: t[n].unsqueeze(0) for n in "qkv"}
        t = {n: v.requires_grad_(n not in constant) if v.is_floating_point() else v for n, v in t.items()}
        known = {"causal": False, "scale": HEAD_DIM**-0.5, "deterministic": True} | changed
        arguments = {n: t.get(n, known.get(n)) for n in FORWARD.inputs}
        if name == FORWARD.name:
            yield tuple(arguments.values())
            continue
        plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        results = dict(zip(FORWARD.outputs, FORWARD.reference(*plain.values()), strict=True))
        upstream = {f"grad_{n}": torch.randn_like(v) for n, v in results.items() if n == "out" or constant}
        needs = {f"need_grad_{n}": isinstance(v, torch.Tensor) and v.requires_grad for n, v in arguments.items()}
        yield tuple((plain | results | upstream | needs).get(n) for n in OPERATORS[name].inputs)


@each_overload(with_backward(FORWARD.name))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


# -- torch.compile and torch.export -----------------------------------------------------------------------------------


def layer(x, scale, bounds):
    """Self-attention on a packed projection (..., T, 3, H, D) that is read in place; rank 4 with bounds is a packed batch."""
    q, k, v = (x * scale).unbind(-3)
    where = {"key_lengths": bounds} if x.dim() == 5 else {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    out, lse = mk.attention(q, k[..., ::2, :], v[..., ::2, :], causal=True, **where, return_lse=True)
    return out.flatten(-2).sin(), lse.tanh()


def arguments(*leading):
    bounds = torch.arange(leading[0]) + 1 if len(leading) == 2 else torch.tensor([0, 1, leading[0] // 2, leading[0]])
    return randn(*leading, 3, HEADS, HEAD_DIM, seed=1).float().requires_grad_(), torch.tensor(0.5, requires_grad=True), bounds.int()


def results(function, given):
    outputs = function(*given)
    leaves = [v for v in given if v.requires_grad]
    return *outputs, *torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in outputs), leaves)


def test_compile_with_dynamic_shapes_and_a_change_of_rank(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for B, T in ((5, 23), (3, 9), (4, 65), (7, 2)):  # the first B is none of the other sizes, which torch would take for one
        assert_same(results(compiled, arguments(B, T)), results(layer, arguments(B, T)))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # sizes are not specialised on
    for leading in ((9,), (3, 4), (31,), (3, 0)):
        assert_same(results(compiled, arguments(*leading)), results(layer, arguments(*leading)))


@pytest.mark.parametrize("axes", ("bhts", "hts", "ts", "bt"))
def test_gradient_of_the_bias_in_compiled_code(implementation, axes):
    def function(q, k, v, bias):
        return mk.attention(q, k, v, bias=bias * 2)

    t = SMALL.but(bias=axes)(CPU, (FP32,))
    given = [t[n].requires_grad_() for n in ("q", "k", "v", "bias")]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    slopes = [torch.autograd.grad(f(*given).square().sum(), given) for f in (compiled, function)]
    assert_same(*slopes)
    assert slopes[0][3].shape == t["bias"].shape and slopes[0][3].any()


@pytest.mark.long
def test_compile_with_inductor(implementation):
    """What users run: neighbours fused around the operator, strides as Inductor likes them."""
    for leading in ((3, 5), (9,)):
        for a, b in zip(*(results(f, arguments(*leading)) for f in (layer, torch.compile(layer, fullgraph=True))), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiled_graph_shows_what_it_runs(implementation):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(layer, backend=keep, fullgraph=True)(*(a.detach() for a in arguments(3, 5)))
    targets = {str(n.target) for n in graphs[0].graph.nodes if str(n.target).startswith("mmgen_kernels.")}
    assert targets == {f"mmgen_kernels.attention.{overload(implementation)}"}


def overload(implementation):
    return "default" if implementation == "cpp" else implementation


def test_export_saved_and_loaded(implementation):
    class Layer(torch.nn.Module):
        def forward(self, x, scale, bounds):
            return layer(x, scale, bounds)

    tokens, sequences = torch.export.Dim("tokens", min=2, max=4096), torch.export.Dim("sequences", min=2, max=64)
    dense = {1: tokens}, None, None
    packed = {0: tokens}, None, {0: sequences}
    for dynamic, leading, others in ((dense, (3, 8), ((3, 3), (3, 65))), (packed, (8,), ((12,), (65,)))):
        program = torch.export.export(Layer(), tuple(a.detach() for a in arguments(*leading)), dynamic_shapes=dynamic)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for other in (leading, *others):
            given = tuple(a.detach() for a in arguments(*other))
            assert_same(loaded(*given), layer(*given))


# -- torch.func -------------------------------------------------------------------------------------------------------


def loss(q, k, v, bias, key_lengths):
    out, lse = mk.attention(q, k, v, bias=bias, key_lengths=key_lengths, causal=True, return_lse=True)
    return (out * torch.linspace(-1, 2, out.shape[-1])).sum() + lse.tanh().square().sum()


SHAPES = (3, 6, 4, 8), (3, 5, 2, 8), (3, 5, 2, 8), (4, 1, 5), (3,)
AXES = {
    "everything": (0, 1, 0, 2, 1),
    "keys": (None, 0, 2, None, None),
    "bias": (None, None, None, 0, None),
    "lengths": (None, None, None, None, 0),
}


@pytest.mark.parametrize("name", AXES)
def test_vmap_and_gradients_per_sample(implementation, name):
    axes, given = AXES[name], []
    for seed, (shape, axis) in enumerate(zip(SHAPES, AXES[name], strict=True)):
        values = randn(*(() if axis is None else (3,)), *shape, seed=seed).float()
        given.append(values if axis is None else values.movedim(0, axis))
    given[-1] = (given[-1].abs() * 4 + 1).to(torch.int32)

    def slopes(*values):
        return grad(loss, argnums=(0, 1, 2, 3))(*values)

    def loop(function):
        each = [function(*(v if a is None else v.select(a, i) for v, a in zip(given, axes, strict=True))) for i in range(3)]
        return [torch.stack(o) for o in zip(*each, strict=True)]

    def value(*values):
        return (loss(*values),)

    for function in (value, slopes):
        assert_same(vmap(function, in_dims=axes)(*given), loop(function))


def test_func_grad_equals_autograd(implementation):
    given = [randn(*s, seed=i).float().requires_grad_() for i, s in enumerate(SHAPES[:4])]
    lengths = torch.tensor([5, 1, 3])
    expected = torch.autograd.grad(loss(*given, lengths), given)
    assert_same(grad(loss, argnums=(0, 1, 2, 3))(*(v.detach() for v in given), lengths), expected)
    assert same_bits(grad(loss, argnums=3)(*(v.detach() for v in given), lengths), expected[3])


def test_second_derivative_is_refused(implementation):
    q, k = (randn(3, 5, 4, 8, seed=s).float().requires_grad_() for s in (1, 2))
    (slope,) = torch.autograd.grad(mk.attention(q, k, k).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward has no derivative; the operator is differentiable once"):
        slope.sum().backward()

    def once(a):
        return mk.attention(a, k.detach(), k.detach()).square().sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda a: grad(once)(a).sum())(q.detach())


def test_inference_mode_and_checkpoint(implementation):
    t = SMALL.but(bias="hts", key_lengths=(4, 0, 9))(CPU, (FP32,))
    leaves = [t[n].requires_grad_() for n in ("q", "k", "v", "bias")]

    def function(*floats):
        return mk.attention(*floats[:3], bias=floats[3], key_lengths=t["key_lengths"], return_lse=True)

    def loss(out, lse):
        return out.square().sum() + lse.exp().sum()

    expected = function(*leaves)
    with torch.inference_mode():
        plain = function(*leaves)
    assert_same(plain, expected)
    assert all(v.is_inference() for v in plain)
    with torch.no_grad():
        assert not any(v.requires_grad for v in function(*leaves))
    slopes = torch.autograd.grad(loss(*expected), leaves)
    again = checkpoint(function, *leaves, use_reentrant=False)
    assert_same(torch.autograd.grad(loss(*again), leaves), slopes)
    loss(*checkpoint(lambda *floats: tuple(function(*floats)), *leaves, use_reentrant=True)).backward()
    assert_same([v.grad for v in leaves], slopes)


# -- autocast and choice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("compiled", (False, True))
def test_autocast(implementation, dtype, compiled):
    """q, k and v are cast as torch's attention casts them; bias is not, and the gradients come back in the dtype of the inputs."""
    t = SMALL.but(bias="hts", G=4)(CPU, (FP32,))
    floats = [t[n].requires_grad_() for n in ("q", "k", "v", "bias")]

    def function(q, k, v, bias):
        return mk.attention(q, k, v, bias=bias, return_lse=True)

    expected = function(*(v.to(dtype) for v in floats[:3]), floats[3])
    called = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.autocast("cpu", dtype):
        got = called(*floats)
        stock = F.scaled_dot_product_attention(*(v.transpose(1, 2) for v in floats[:3]))
    assert got[0].dtype == stock.dtype == dtype and got[1].dtype == FP32
    assert_same(got, expected)
    upstream = randn(*got[0].shape, seed=7).to(dtype)
    assert_same(*(torch.autograd.grad(o[0], floats, upstream) for o in (got, expected)))


def test_autocast_of_other_dtypes(implementation):
    """fp64 is left alone and what has the other 16 bits is cast, both as torch does; a mixture becomes one dtype."""
    q = randn(3, 5, 4, 8, seed=1)
    with torch.autocast("cpu", BF16):
        assert mk.attention(q, q, q).dtype == torch.float64
        assert mk.attention(q.half(), q.half(), q.half()).dtype == BF16
        mixed = mk.attention(q.float(), q.bfloat16(), q.half())
    assert same_bits(mixed, mk.attention(q.float().bfloat16(), q.bfloat16(), q.half().bfloat16()))
    for each in (q, q.half()):
        with torch.autocast("cpu", BF16):
            assert F.scaled_dot_product_attention(*(each.transpose(1, 2),) * 3).dtype == mk.attention(each, each, each).dtype


def test_the_implementation_that_was_asked_for_runs(implementation):
    with Called() as called:
        results(layer, arguments(3, 5))
        vmap(lambda x: mk.attention(x, x, x))(torch.randn(2, 3, 5, 4, 8))
    suffix = overload(implementation)
    assert {*map(str, called.ours)} == {f"mmgen_kernels.attention.{suffix}", f"mmgen_kernels.attention_backward.{suffix}"}


def test_use_backend_reference():
    """What it gives is the reference called directly, for a packed batch as for a sample of its own."""
    t = PACKED(CPU, (FP32,))
    with mk.use_backend("reference", family="attn"):
        got = mk.attention(**t, return_lse=True)
    known = {n: t[n].unsqueeze(0) if n in "qkv" else t[n] for n in t} | {"causal": False, "scale": 72**-0.5, "deterministic": True}
    out, lse, *_ = FORWARD.reference(*(known.get(n) for n in FORWARD.inputs))
    assert_same(got, (out.squeeze(0), lse.squeeze(0).to(got.lse.dtype)))


@pytest.mark.parametrize("name", sorted(set(backends.IMPLEMENTATIONS) - set(IMPLEMENTATIONS)))
def test_use_backend_that_cannot_serve(name):
    q = torch.randn(2, 3, 4, 8)
    with mk.use_backend(name), pytest.raises(RuntimeError, match=rf"use_backend\('{name}'\) cannot serve attention"):
        mk.attention(q, q, q)


def test_the_cpu_has_its_own_kernel_where_it_is_built():
    expected = "cpp" if FORWARD.has_cpp else "torch"
    assert backends.choose(FORWARD, "attn", "cpu") == expected
