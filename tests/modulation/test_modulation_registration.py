"""The family with torch's machinery: opcheck, compile, export, vmap, torch.func, autocast, choice of implementation."""

import io

import pytest
import torch
from called import Called
from overloads import each_overload, with_backward
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.modulation.data import inputs
from mmgen_kernels.battery.modulation.law import OPTIONS, call
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
FORWARDS = ("adaln", "gate_residual", "gate_residual_adaln")
EVERY = "y gate shift scale shift_2 scale_2 weight bias post_weight table"


@pytest.fixture(params=battery.implementations("gate_residual_adaln", CPU))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- opcheck ----------------------------------------------------------------------------------------------------------

# What the operator is called with: given vectors, their address, layout of x and y, dtypes, options.
SAMPLES = (
    (EVERY, "sample", None, torch.float32, {"post_norm": "layer"}),
    ("y", "sample", None, torch.float32, {}),
    ("y gate shift scale table", "frame", None, torch.float32, {"gate_fn": "tanh", "norm": "rms"}),
    (EVERY, "rows shared", None, torch.float32, {"post_norm": "rms", "gate_fn": "sigmoid_one_minus"}),
    (EVERY, "token shared", (1, 0, 2), torch.bfloat16, {"post_norm": "rms"}),
    ("y gate scale_2", "sample", (0, 2, 1), torch.float32, {"dtype": torch.bfloat16}),
)


def samples(name):
    """Arguments that reach every branch of an operator's fake and schema. Called per overload: opcheck may keep the tensors."""
    forward = OPERATORS[name.removesuffix("_backward")]
    for names, address, order, dtype, changed in SAMPLES:
        t = inputs(names, (3, 6, 8), address)(CPU, (dtype,))
        if order is not None:
            inverse = [order.index(i) for i in range(3)]
            t |= {n: t[n].permute(order).contiguous().permute(inverse) for n in ("x", "y")}
        known = {"norm": "layer", "eps": 1e-6, "dtype": dtype, "gate_fn": "identity", "post_norm": None, "post_eps": 1e-6} | changed
        t = {n: v if n == "rows" else v.requires_grad_() for n, v in t.items()}
        if "table" in t:  # a row for each vector that this operator takes
            t["table"] = t["table"].detach()[: sum(n in t for n in forward.inputs if n in VECTORS)].requires_grad_()
        arguments = {n: t.get(n, known.get(n)) for n in forward.inputs}
        if name == forward.name:
            yield tuple(arguments.values())
            continue
        plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        results = dict(zip(forward.outputs, forward.reference(*plain.values()), strict=True))
        results["x"] = results.get("residual", plain["x"])
        upstream = {f"grad_{n}": torch.randn_like(v) for n, v in results.items() if v.numel() and "statistics" not in n}
        if some := address == "token shared":  # of the inputs have a gradient, and not every output
            upstream.pop(next(iter(upstream)))
        needs = {f"need_grad_{n}": not some or n not in ("y", "scale", "weight") for n in forward.inputs}
        yield tuple((plain | results | upstream | needs).get(n) for n in OPERATORS[name].inputs)


VECTORS = ("gate", "shift", "scale", "shift_2", "scale_2")


@each_overload(with_backward(*FORWARDS))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


# -- torch.compile and torch.export -----------------------------------------------------------------------------------


def seam(x, y, modulation):
    shift, scale, gate = modulation.chunk(3, dim=-1)
    residual, modulated = mk.gate_residual_adaln(x, y, gate, shift, scale, gate_fn="tanh")
    return mk.gate_residual(residual, mk.adaln(modulated, None, scale, norm="rms"), gate)


def arguments(*leading, dim=6):
    return tuple(v.requires_grad_() for v in (randn(*leading, dim, seed=1).float(), randn(*leading, dim, seed=2).float(),
                                              randn(leading[0], 3 * dim, seed=3).float()))  # fmt: skip


def results(function, given):
    out = function(*given)
    return out, *torch.autograd.grad((out * torch.linspace(0, 1, given[0].shape[-1])).sum(), given)


def test_compile_with_dynamic_shapes_and_a_change_of_rank(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(seam, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for B, T in ((3, 23), (5, 9), (4, 64), (7, 2)):
        assert_same(results(compiled, arguments(B, T)), results(seam, arguments(B, T)))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # sizes are not specialised on
    for leading in ((9,), (3, 2, 4), (3, 1), (3, 0), (5, 3)):
        assert_same(results(compiled, arguments(*leading)), results(seam, arguments(*leading)))


def test_compile_with_rows_and_options(implementation):
    def function(x, matrix, table, rows, norm):
        return mk.adaln(x, (matrix, None), (matrix, matrix), table=table, rows=rows, norm=norm)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, R, norm in ((11, 5, "layer"), (30, 3, "rms"), (2, 2, "layer")):
        rows = torch.arange(N) % (R + 1)
        given = randn(N, 6, seed=1).float(), randn(R, 6, seed=2).float(), randn(3, 6, seed=3).float(), rows, norm
        assert_same(compiled(*given), function(*given))


@pytest.mark.long
def test_compile_with_inductor(implementation):
    """What users run: neighbours fused around the operators, strides as Inductor likes them."""

    def function(x, y, modulation):
        return seam((x * 2).transpose(0, 1).contiguous().transpose(0, 1), y + 1, modulation) * 3

    for a, b in zip(*(results(f, arguments(3, 5)) for f in (function, torch.compile(function, fullgraph=True))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiled_graph_shows_what_it_runs(implementation):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(seam, backend=keep, fullgraph=True)(*(a.detach() for a in arguments(3, 5)))
    targets = {str(n.target) for n in graphs[0].graph.nodes if str(n.target).startswith("mmgen_kernels.")}
    suffix = "reference" if implementation == "reference" else "default"
    assert targets == {f"mmgen_kernels.{name}.{suffix}" for name in FORWARDS}


def test_export_saved_and_loaded(implementation):
    class Seam(torch.nn.Module):
        def forward(self, x, y, modulation):
            return seam(x, y, modulation)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    given = tuple(a.detach() for a in arguments(3, 8))
    program = torch.export.export(Seam(), given, dynamic_shapes=({1: tokens}, {1: tokens}, None))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T in (8, 3, 100):
        given = tuple(a.detach() for a in arguments(3, T))
        assert same_bits(loaded(*given), seam(*given))


# -- torch.func -------------------------------------------------------------------------------------------------------


def loss(x, y, vector, matrix, rows):
    """Some vectors are None, some are shared, some are addressed by rows."""
    residual, (first, second) = mk.gate_residual_adaln(x, y, vector, (None, matrix), (vector, None), rows=rows, post_norm="rms")
    weights = torch.linspace(-1, 2, x.shape[-1])
    return ((residual + first.tanh() + second.square()) * weights).sum()


AXES = {
    "x": (0, 0, None, None, None),
    "everything": (0, 1, 0, 2, 1),
    "vectors": (None, None, 0, 1, None),
    "rows": (None, None, None, None, 0),
}


@pytest.mark.parametrize("name", AXES)
def test_vmap_and_gradients_per_sample(implementation, name):
    axes = AXES[name]

    def batched(shape, axis, seed):
        values = randn(*(() if axis is None else (3,)), *shape, seed=seed).float()
        return values if axis is None else values.movedim(0, axis)

    shapes = (4, 5, 6), (4, 5, 6), (6,), (7, 6), (4, 5)
    given = [batched(s, a, i) for i, (s, a) in enumerate(zip(shapes, axes, strict=True))]
    given[-1] = (given[-1] * 4).to(torch.int32)

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
    given = [randn(*s, seed=i).float().requires_grad_() for i, s in enumerate(((4, 5, 6), (4, 5, 6), (6,), (7, 6)))]
    rows = torch.arange(20, dtype=torch.int32).view(4, 5) % 7
    expected = torch.autograd.grad(loss(*given, rows), given)
    assert_same(grad(loss, argnums=(0, 1, 2, 3))(*(v.detach() for v in given), rows), expected)
    assert same_bits(grad(loss, argnums=2)(*(v.detach() for v in given), rows), expected[2])


def test_func_grad_of_gate_residual(implementation):
    """The gradient of x is passed on there too."""
    x, y, gate = (v.detach() for v in (randn(3, 5, 6, seed=1), randn(3, 5, 6, seed=2), randn(3, 6, seed=3)))
    weights = randn(3, 5, 6, seed=4)
    of_x, of_gate = grad(lambda a, g: (mk.gate_residual(a, y, g) * weights).sum(), argnums=(0, 1))(x, gate)
    assert torch.equal(of_x, weights)
    torch.testing.assert_close(of_gate, (weights * y).sum(1))


def test_second_derivative_is_refused_by_torch_func(implementation):
    x, v = randn(3, 5, 6, seed=1).float(), randn(3, 6, seed=2).float()

    def once(a):
        return mk.adaln(a, v, v).square().sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda a: grad(once)(a).sum())(x)


# -- autocast and choice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("compiled", (False, True))
def test_autocast(implementation, dtype, compiled):
    """The residual keeps x's dtype, the modulated output takes autocast's, and nothing is cast on its way in."""
    x, y, modulation = (v.detach() for v in arguments(3, 5))
    gate, shift, scale = modulation.chunk(3, dim=-1)

    def function(x):
        return mk.gate_residual_adaln(x, y, gate, shift, scale), mk.adaln(x, shift, scale), mk.gate_residual(x, y, gate)

    expected = function(x)
    called = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.autocast("cpu", dtype):
        (residual, modulated), alone, updated = called(x)
        assert mk.adaln(x, shift, scale, dtype=torch.float32).dtype == torch.float32
        assert mk.adaln(x.double(), shift, scale).dtype == torch.float64
        assert mk.gate_residual(x.half(), y, gate).dtype == torch.float16
    assert same_bits(residual, expected[0][0]) and same_bits(updated, expected[2])
    assert same_bits(modulated, expected[0][1].to(dtype)) and same_bits(alone, expected[1].to(dtype))


def test_autocast_does_not_touch_the_backward(implementation):
    given = arguments(3, 5)
    gate, shift, scale = given[2].chunk(3, dim=-1)
    upstream = randn(3, 5, 6, seed=7).bfloat16()

    def gradients(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, modulated = mk.gate_residual_adaln(given[0], given[1], gate, shift, scale, dtype=torch.bfloat16)
            return torch.autograd.grad(modulated, given, upstream)

    assert_same(gradients(True), gradients(False))


def test_the_implementation_that_was_asked_for_runs(implementation):
    given = arguments(3, 5)
    with Called() as called:
        results(seam, given)
        vmap(seam)(*(v.detach()[None].expand(2, *v.shape) for v in given))
    suffix = "reference" if implementation == "reference" else "default"
    expected = {f"mmgen_kernels.{name}{part}.{suffix}" for name in FORWARDS for part in ("", "_backward")}
    assert {*map(str, called.ours)} == expected


@pytest.mark.parametrize("operator", FORWARDS)
def test_use_backend_reference(operator):
    """What it gives is the reference called directly."""
    t = inputs(EVERY, (3, 6, 8))(CPU, (torch.float32,))
    options = OPTIONS[operator] | ({} if operator == "adaln" else {"post_norm": "rms"})
    t["table"] = t["table"][: sum(n in OPERATORS[operator].inputs for n in VECTORS)]
    with mk.use_backend("reference", family="modulation"):
        got = call(operator, t, options)
    given = [t.get(n, options.get(n) or (torch.float32 if n == "dtype" else None)) for n in OPERATORS[operator].inputs]
    assert_same(got.values(), OPERATORS[operator].reference(*given)[: len(got)])
    if "triton" not in battery.implementations(operator, CPU):
        with mk.use_backend("triton"), pytest.raises(RuntimeError, match=rf"use_backend\('triton'\) cannot serve {operator}"):
            call(operator, t, options)


def test_shapes_on_the_meta_device():
    x, vector = torch.empty(2, 5, 8, device="meta"), torch.empty(2, 8, device="meta")
    assert mk.adaln(x, vector, vector).shape == x.shape
    outputs = mk.gate_residual_adaln(x, x, vector, vector, vector)
    assert [(t.shape, t.device.type) for t in outputs] == 2 * [(x.shape, "meta")]
