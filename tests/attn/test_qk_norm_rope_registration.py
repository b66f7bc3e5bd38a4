"""qk_norm_rope with torch's machinery: opcheck, compile, export, vmap, torch.func, autocast, choice of implementation."""

import io

import pytest
import torch
from overloads import each_overload, with_backward
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.attn.qk_norm_rope import AFFINE, TABLES, Inputs, call
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
SMALL = Inputs(B=2, T=6, H=3, G=2, D=8, biases=True)
OPERATOR = OPERATORS["qk_norm_rope"]


@pytest.fixture(params=battery.implementations("qk_norm_rope", CPU))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- opcheck ----------------------------------------------------------------------------------------------------------

# inputs, dtypes, options, what of q, k and their parameters wants no gradient
SAMPLES = (
    (SMALL, (torch.float32,), {}, ()),
    (SMALL.but(across=True, per_sample=True), (torch.bfloat16, torch.float32), {"norm": "layer"}, ("k", "q_weight")),
    (SMALL.but(weights=False, biases=False, P=2), (torch.float32,), {"norm": None, "interleaved": True}, ("q",)),
    (SMALL.but(P=0, S=4, layout=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)), (torch.float32,), {}, AFFINE),
)


def samples(name):
    for inputs, dtypes, options, without in SAMPLES:
        t = inputs(CPU, dtypes)
        known = {"norm": "rms", "across_heads": inputs.across, "eps": 1e-6, "interleaved": False} | options
        t = {n: v if n in TABLES or n in without else v.requires_grad_() for n, v in t.items()}
        given = {n: t.get(n, known.get(n)) for n in OPERATOR.inputs}
        if name == OPERATOR.name:
            yield tuple(given.values())
            continue
        plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        plain |= {f"grad_rotated_{n}": torch.randn(t[n].shape).to(t[n].dtype) for n in "qk" if n not in without}
        plain |= {f"need_grad_{n}": n not in without for n in OPERATOR.inputs}
        yield tuple(plain.get(n) for n in OPERATORS[name].inputs)


@each_overload(with_backward(OPERATOR.name))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


# -- torch.compile and torch.export -----------------------------------------------------------------------------------


def function(qkv, weight, cos, sin):
    q, k, _ = qkv.unbind(2)
    q, k = mk.qk_norm_rope(q, k, q_weight=weight, k_weight=weight * 2, cos=cos, sin=sin, interleaved=True)
    return mk.qk_norm_rope(q.tanh(), k, norm="layer", across_heads=True)


def arguments(B, T, H=2, D=8):
    cos, sin = mk.rope_table(torch.arange(T)[:, None], (D,))
    return randn(B, T, 3, H, D, seed=1).float().requires_grad_(), randn(D, seed=2).float().requires_grad_(), cos, sin


def results(run, given):
    out = run(*given)
    total = sum((v * torch.linspace(0, 1, v.shape[-1])).sum() for v in out)
    return *out, *torch.autograd.grad(total, given[:2])


def test_compile_with_dynamic_shapes(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for B, T in ((5, 23), (4, 9), (3, 64), (7, 2)):  # the first of sizes that differ from all others: equal ones count as one
        assert_same(results(compiled, arguments(B, T)), results(function, arguments(B, T)))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # sizes are not specialised on
    for B, T in ((1, 5), (3, 1), (2, 0)):
        assert_same(results(compiled, arguments(B, T)), results(function, arguments(B, T)))


def test_compile_of_a_table_made_inside(implementation):
    """And of one that gains a dimension."""

    def run(q, positions):
        cos, sin = mk.rope_table(positions, (4, 4))
        return mk.qk_norm_rope(q, q, cos=cos, sin=sin)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for positions in (torch.arange(14).view(7, 2), torch.arange(28).view(2, 7, 2)):
        q = randn(2, 7, 3, 8, seed=1).float()
        assert_same(compiled(q, positions), run(q, positions))


@pytest.mark.long
def test_compile_with_inductor(implementation):
    def run(qkv, *rest):
        return tuple(v * 3 for v in function((qkv * 2).transpose(0, 1).contiguous().transpose(0, 1), *rest))

    for a, b in zip(*(results(f, arguments(3, 5)) for f in (run, torch.compile(run, fullgraph=True))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiled_graph_shows_what_it_runs(implementation):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(function, backend=keep, fullgraph=True)(*(a.detach() for a in arguments(3, 5)))
    targets = {str(n.target) for n in graphs[0].graph.nodes if str(n.target).startswith("mmgen_kernels.")}
    assert targets == {f"mmgen_kernels.qk_norm_rope.{'reference' if implementation == 'reference' else 'default'}"}


def test_export_saved_and_loaded(implementation):
    class Module(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    given = tuple(a.detach() for a in arguments(3, 8))
    program = torch.export.export(Module(), given, dynamic_shapes={"given": ({1: tokens}, None, {0: tokens}, {0: tokens})})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T in (8, 3, 100):
        given = tuple(a.detach() for a in arguments(3, T))
        assert_same(loaded(*given), function(*given))


# -- torch.func -------------------------------------------------------------------------------------------------------

# which dimension of q, k, weight, cos and sin is the batch
AXES = {
    "q_and_k": (0, 1, None, None, None),
    "q": (2, None, None, None, None),
    "tables": (None, None, None, 0, 1),
    "everything": (0, 1, 1, 2, 0),
    "weight": (None, None, 0, None, None),
}


def loss(q, k, weight, cos, sin):
    q, k = mk.qk_norm_rope(q, k, q_weight=weight, cos=cos, sin=sin)
    return (q.tanh() * torch.linspace(-1, 2, q.shape[-1])).sum() + k.sin().sum()


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("per_sample", (False, True))
def test_vmap_and_gradients_per_sample(implementation, name, per_sample):
    axes, V = AXES[name], 3
    table = (2, 5, 3) if per_sample else (5, 3)

    def batched(shape, axis, seed):
        values = randn(*(() if axis is None else (V,)), *shape, seed=seed).float()
        return values if axis is None else values.movedim(0, axis)

    shapes = (2, 5, 3, 8), (2, 5, 2, 8), (8,), table, table
    given = [batched(s, a, i) for i, (s, a) in enumerate(zip(shapes, axes, strict=True))]

    def outputs(q, k, weight, cos, sin):
        return mk.qk_norm_rope(q, k, k_weight=weight, cos=cos, sin=sin, interleaved=True)

    def slopes(*values):
        return grad(loss, argnums=(0, 1, 2))(*values)

    for f in (outputs, slopes):
        each = [f(*(v if a is None else v.select(a, i) for v, a in zip(given, axes, strict=True))) for i in range(V)]
        assert_same(vmap(f, in_dims=axes)(*given), [torch.stack(o) for o in zip(*each, strict=True)])


def test_func_grad_equals_autograd(implementation):
    qkv, weight, cos, sin = arguments(2, 5)
    given = (*(t.detach().requires_grad_() for t in qkv.detach().unbind(2)[:2]), weight)
    cos, sin = cos[:, :3], sin[:, :3]
    expected = torch.autograd.grad(loss(*given, cos, sin), given)
    assert_same(grad(loss, argnums=(0, 1, 2))(*(v.detach() for v in given), cos, sin), expected)


# -- autocast and the choice of implementation --------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", (False, True))
def test_autocast_casts_nothing(implementation, compiled):
    """fp32 weights and tables beside bf16 activations are read as they are; forward and backward."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        t = SMALL(CPU, (dtype, torch.float32, torch.float32))
        t = {n: v if n in TABLES else v.requires_grad_() for n, v in t.items()}
        leaves = [t[n] for n in ("q", "k", *AFFINE)]

        def run(autocast, t=t, leaves=leaves):
            called = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled and autocast else call
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = list(called(t, {"norm": "layer"}).values())
            return *out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])

        expected = run(False)
        assert expected[0].dtype == dtype and expected[2].dtype == dtype and expected[4].dtype == torch.float32
        assert_same(run(True), expected)


def test_the_implementation_that_was_asked_for_runs():
    t = SMALL(CPU, (torch.float32,))
    with mk.use_backend("reference", family="attn"):
        got = call(t, {})
    given = [t.get(n, {"norm": "rms", "across_heads": False, "eps": 1e-6, "interleaved": False}.get(n)) for n in OPERATOR.inputs]
    assert_same(got.values(), OPERATOR.reference(*given))
    if "triton" not in battery.implementations("qk_norm_rope", CPU):
        with mk.use_backend("triton"), pytest.raises(RuntimeError, match=r"use_backend\('triton'\) cannot serve qk_norm_rope"):
            call(t, {})
