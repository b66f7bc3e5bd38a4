"""joint_attention beyond the battery: gradcheck, attention of joined streams, bits, bad input, torch's machinery."""

import io

import pytest
import torch
import torch.nn.functional as F
from overloads import each_overload, with_backward
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.attn.data import BF16, FP16, FP32, FP64, LAYOUTS
from mmgen_kernels.battery.attn.joint_attention import FLOATS, Inputs, call
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
FORWARD = OPERATORS["joint_attention"]
IMPLEMENTATIONS = battery.implementations("joint_attention", CPU)
SMALL = Inputs(T=(3, 5), D=8, B=2, H=4, G=2)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def leaves(t):
    return {n: v.detach().requires_grad_() if n in FLOATS else v for n, v in t.items()}


def slopes(outputs, wanted):
    """Gradients of a sum in which every element has a weight of its own."""
    weights = [torch.linspace(-1, 2, o.numel()).view(o.shape).to(o) for o in outputs]
    return torch.autograd.grad(outputs, wanted, weights)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", ((None, None), ((2, 0), None), ((2, 0), (3, 5))))
def test_gradcheck(implementation, lengths):
    t = leaves(SMALL.but(key_lengths=lengths)(CPU, (FP64,)))

    def function(*values):
        return tuple(call(t | dict(zip(FLOATS, values, strict=True)), {"scale": 0.5}).values())

    assert torch.autograd.gradcheck(function, tuple(t[n] for n in FLOATS))


@pytest.mark.parametrize("dtype", (FP64, FP32, BF16, FP16))
def test_it_is_attention_of_the_joined_streams(implementation, dtype):
    """To the bit, gradients too: tiles of keys do not know where a stream ends."""
    t = leaves(Inputs(T=(77, 130), H=4, G=2)(CPU, (dtype,)))
    joined = [torch.cat((t[f"{n}_1"], t[f"{n}_2"]), 1) for n in "qkv"]
    wanted = [t[n] for n in FLOATS]
    expected = mk.attention(*joined).split((77, 130), 1)
    got = tuple(call(t, {}).values())
    assert_same((*got, *slopes(got, wanted)), (*expected, *slopes(expected, wanted)))


def test_it_is_scaled_dot_product_attention(implementation):
    t = leaves(SMALL.but(G=4)(CPU, (FP64,)))
    stock = F.scaled_dot_product_attention(*(torch.cat((t[f"{n}_1"], t[f"{n}_2"]), 1).transpose(1, 2) for n in "qkv"))
    got = tuple(call(t, {}).values())
    expected = stock.transpose(1, 2).split((3, 5), 1)
    wanted = [t[n] for n in FLOATS]
    for a, b in zip((*got, *slopes(got, wanted)), (*expected, *slopes(expected, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_keys_beyond_the_lengths_have_gradient_0(implementation):
    t = leaves(SMALL.but(T=(70, 80), key_lengths=((3, 0), (66, 80)))(CPU, (BF16,)))
    of = dict(zip(FLOATS, slopes(tuple(call(t, {}).values()), [t[n] for n in FLOATS]), strict=True))
    for stream, lengths in (("1", (3, 0)), ("2", (66, 80))):
        for b, length in enumerate(lengths):
            for n in "kv":
                assert not of[f"{n}_{stream}"][b, length:].any() and (length == 0 or of[f"{n}_{stream}"][b, :length].any())


@pytest.mark.parametrize("name", FLOATS)
def test_only_what_is_needed_is_differentiated(implementation, name):
    """Each input alone gets the gradient that it gets among all."""
    t = leaves(SMALL(CPU, (FP32,)))
    expected = dict(zip(FLOATS, slopes(tuple(call(t, {}).values()), [t[n] for n in FLOATS]), strict=True))
    alone = {n: v.detach().requires_grad_(n == name) for n, v in t.items()}
    assert_same(slopes(tuple(call(alone, {}).values()), [alone[name]]), [expected[name]])


@pytest.mark.parametrize("layout", (*LAYOUTS.values(), lambda g: g[:1, :1, :1, :1].expand(g.shape)))
def test_upstream_gradients_of_any_layout(implementation, layout):
    t = leaves(SMALL(CPU, (FP32,)))
    outputs, wanted = tuple(call(t, {}).values()), [t[n] for n in FLOATS]
    given = [layout(randn(*o.shape, seed=i).float()) for i, o in enumerate(outputs)]
    found = torch.autograd.grad(outputs, wanted, given, retain_graph=True)
    assert_same(found, torch.autograd.grad(outputs, wanted, [g.contiguous() for g in given]))


def test_streams_are_read_and_kept_in_place(implementation):
    """Nothing as large as a stream is kept but the streams and the outputs themselves, and results are dense."""
    packed = [torch.randn(2, n, 3, 4, 8, requires_grad=True) for n in (3, 5)]
    (q_1, k_1, v_1), (q_2, k_2, v_2) = (p.unbind(2) for p in packed)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        outs = mk.joint_attention((q_1, q_2), (k_1, k_2), (v_1, v_2))
    assert set(kept) >= {t.data_ptr() for t in (q_1, k_1, v_1, q_2, k_2, v_2, *outs)} and len(set(kept)) == 9  # lse is the ninth
    assert all(o.is_contiguous() for o in outs)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_same_bits_in_twenty_runs(implementation, dtype):
    t = leaves(Inputs(T=(77, 130), key_lengths=((77, 20, 3), None))(CPU, (dtype,)))
    wanted = [t[n] for n in FLOATS]

    def once():
        outputs = tuple(call(t, {}).values())
        return *outputs, *slopes(outputs, wanted)

    first = once()
    for _ in range(19):
        assert_same(once(), first)


# -- bad input --------------------------------------------------------------------------------------------------------

Q, K, META = torch.zeros(3, 6, 4, 8), torch.zeros(3, 5, 2, 8), torch.device("meta")
COUNTS = torch.zeros(3, dtype=torch.int32)
BAD = {
    "queries_tensor": ({"queries": Q}, TypeError, "queries must be a tuple of two streams, got Tensor"),
    "queries_none": ({"queries": None}, TypeError, "queries must be a tuple of two streams, got NoneType"),
    "queries_one": ({"queries": (Q,)}, ValueError, "queries must be a tuple of two streams, got 1"),
    "keys_three": ({"keys": (K, K, K)}, ValueError, "keys must be a tuple of two streams, got 3"),
    "values_dict": ({"values": {1: K, 2: K}}, TypeError, "values must be a tuple of two streams, got dict"),
    "query_list": ({"queries": (Q, [0.0])}, TypeError, r"queries\[1\] must be a tensor, got list"),
    "query_int": ({"queries": (Q.int(), Q)}, TypeError, r"queries\[0\] must be float64, .*got torch.int32"),
    "key_dtype": ({"keys": (K, K.half())}, TypeError, r"keys\[1\] must have queries\[1\]'s dtype torch.float32, got torch.float16"),
    "stream_dtype": ({n: (t, t.half()) for n, t in (("queries", Q), ("keys", K), ("values", K))}, TypeError,
        r"queries\[1\] must have queries\[0\]'s dtype torch.float32, got torch.float16"),
    "stream_device": ({n: (t, t.to(META)) for n, t in (("queries", Q), ("keys", K), ("values", K))}, ValueError,
        r"queries\[1\] must be on queries\[0\]'s device cpu, got meta"),
    "rank": ({"queries": (Q, Q[0])}, ValueError, r"queries\[1\] must be \(B, T, H, D\), got shape \(6, 4, 8\)"),
    "head_dim": ({"queries": (Q[..., :4], Q)}, ValueError, r"queries\[0\] must have a head dimension that is a multiple of 8"),
    "key_shape": ({"keys": (K, K[:2])}, ValueError, r"keys\[1\] must be \(3, S, G, 8\), got shape \(2, 5, 2, 8\)"),
    "value_shape": ({"values": (K[:, :4], K)}, ValueError,
        r"values\[0\] must have keys\[0\]'s shape \(3, 5, 2, 8\), got \(3, 4, 2, 8\)"),
    "samples": ({n: (t, t[:2]) for n, t in (("queries", Q), ("keys", K), ("values", K))}, ValueError,
        r"queries\[1\] must be \(3, T, 4, 8\), as queries\[0\] is, got shape \(2, 6, 4, 8\)"),
    "heads": ({"queries": (Q, Q[:, :, :2])}, ValueError, r"queries\[1\] must be \(3, T, 4, 8\), as queries\[0\] is"),
    "groups": ({"keys": (K, K[:, :, :1]), "values": (K, K[:, :, :1])}, ValueError,
        r"keys\[1\] must have keys\[0\]'s 2 heads, got 1"),
    "lengths_tensor": ({"key_lengths": COUNTS}, TypeError, "key_lengths must be a tuple of two streams, got Tensor"),
    "lengths_float": ({"key_lengths": (None, COUNTS.float())}, TypeError, r"key_lengths\[1\] must be int32 or int64"),
    "lengths_shape": ({"key_lengths": (COUNTS[:2], None)}, ValueError, r"key_lengths\[0\] must be \(3,\), .*got \(2,\)"),
    "lengths_device": ({"key_lengths": (COUNTS.to(META), None)}, ValueError, r"key_lengths\[0\] must be on queries\[0\]'s device"),
    "scale": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("autocast", (False, True))
def test_bad_input(name, autocast):
    changed, error, message = BAD[name]
    if autocast and "dtype" in name:
        pytest.skip("autocast makes one dtype of all")
    with torch.autocast("cpu", BF16, enabled=autocast), pytest.raises(error, match=f"^{message}"):
        mk.joint_attention(**({"queries": (Q, Q), "keys": (K, K), "values": (K, K)} | changed))


def test_meta_tensors_have_the_right_shapes():
    q, other, k = Q.to(META).half(), Q[:, :2].to(META).half(), K.to(META).half()
    with mk.use_backend("reference"):
        outs = mk.joint_attention((q, other), (k, k), (k, k))
    assert [o.shape for o in outs] == [q.shape, other.shape] and all(o.dtype == FP16 and o.device == META for o in outs)


# -- torch's machinery ------------------------------------------------------------------------------------------------


def samples(name):
    """Arguments of the operator; called per overload, as opcheck may keep the tensors."""
    for inputs, dtype, constant in (
        (SMALL, FP32, ()),
        (SMALL.but(key_lengths=((2, 0), (9, 1)), layout=LAYOUTS["projection"]), BF16, ("k_1", "q_2")),
    ):
        t = inputs(CPU, (dtype,))
        known = {n: v.requires_grad_(n not in constant) if n in FLOATS else v for n, v in t.items()} | {"scale": 0.5}
        if name == FORWARD.name:
            yield tuple(known.get(n) for n in FORWARD.inputs)
            continue
        plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in known.items()}
        results = dict(zip(FORWARD.outputs, FORWARD.reference(*(plain.get(n) for n in FORWARD.inputs)), strict=True))
        upstream = {f"grad_{n}": torch.randn_like(v) for n, v in results.items() if n == "out_1" or not constant}
        needs = {f"need_grad_{n}": n not in constant for n in FLOATS}
        yield tuple((plain | results | upstream | needs).get(n) for n in OPERATORS[name].inputs)


@each_overload(with_backward(FORWARD.name))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


def layer(text, image, lengths):
    """Packed projections (B, T, 3, H, D) of both streams, read in place; of the text some tokens are padding."""
    streams = [p.unbind(2) for p in (text, image)]
    outs = mk.joint_attention(*zip(*streams, strict=True), key_lengths=(lengths, None))
    return tuple(o.flatten(-2).sin() for o in outs)


def arguments(B, T_1, T_2):
    packed = [randn(B, n, 3, 4, 8, seed=n).float().requires_grad_() for n in (T_1, T_2)]
    return *packed, torch.arange(B) % (T_1 + 1)


def results(function, given):
    outputs = function(*given)
    return *outputs, *slopes(outputs, given[:2])


def test_compile_with_dynamic_shapes(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for sizes in ((6, 23, 11), (3, 9, 70), (2, 64, 5)):
        assert_same(results(compiled, arguments(*sizes)), results(layer, arguments(*sizes)))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # sizes are not specialised on


def test_export_saved_and_loaded(implementation):
    class Layer(torch.nn.Module):
        def forward(self, text, image, lengths):
            return layer(text, image, lengths)

    texts, images = torch.export.Dim("texts", min=2, max=4096), torch.export.Dim("images", min=2, max=4096)
    given = tuple(a.detach() for a in arguments(3, 7, 9))
    program = torch.export.export(Layer(), given, dynamic_shapes=({1: texts}, {1: images}, None))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for sizes in ((3, 7, 9), (3, 65, 2)):
        given = tuple(a.detach() for a in arguments(*sizes))
        assert_same(loaded(*given), layer(*given))


def test_vmap_and_func_grad(implementation):
    t = [randn(3, 2, n, 4, 8, seed=n + i).float() for n in (3, 5) for i in range(3)]

    def loss(*streams):
        outs = mk.joint_attention(streams[::3], streams[1::3], streams[2::3])
        return sum(o.square().sum() for o in outs)

    each = [grad(loss, argnums=tuple(range(6)))(*(v[i] for v in t)) for i in range(3)]
    assert_same(vmap(grad(loss, argnums=tuple(range(6))))(*t), [torch.stack(g) for g in zip(*each, strict=True)])
    held = [v[0].clone().requires_grad_() for v in t]
    assert_same(torch.autograd.grad(loss(*held), held), each[0])


@pytest.mark.parametrize("dtype", (BF16, FP16))
def test_autocast(implementation, dtype):
    t = leaves(SMALL(CPU, (FP32,)))
    with torch.autocast("cpu", dtype):
        got = tuple(call(t, {}).values())
    expected = tuple(call({n: v.to(dtype) for n, v in t.items()}, {}).values())
    assert all(o.dtype == dtype for o in got)
    wanted = [t[n] for n in FLOATS]
    assert_same((*got, *slopes(got, wanted)), (*expected, *slopes(expected, wanted)))


def test_inference_mode_checkpoint_and_second_derivative(implementation):
    t = leaves(SMALL.but(key_lengths=((2, 0), None))(CPU, (FP32,)))
    wanted = [t[n] for n in FLOATS]
    expected = tuple(call(t, {}).values())
    with torch.inference_mode():
        assert_same(call({n: v.detach() for n, v in t.items()}, {}).values(), expected)
    again = checkpoint(lambda: tuple(call(t, {}).values()), use_reentrant=False)
    assert_same(slopes(again, wanted), slopes(expected, wanted))
    (slope,) = torch.autograd.grad(call(t, {})["out_1"].square().sum(), t["q_1"], create_graph=True)
    with pytest.raises(RuntimeError, match="joint_attention_backward has no derivative; the operator is differentiable once"):
        slope.sum().backward()


def test_lengths_may_be_any_integers(implementation):
    q, k = randn(3, 4, 2, 8, seed=1).float(), randn(3, 6, 2, 8, seed=2).float()
    for lengths in (torch.tensor([-(2**63), 2**63 - 1, 3]), torch.tensor([-5, 9, 3], dtype=torch.int32)):
        expected = mk.joint_attention((q, q), (k, k), (k, k), key_lengths=(torch.tensor([0, 6, 3]), None))
        assert_same(mk.joint_attention((q, q), (k, k), (k, k), key_lengths=(lengths, None)), expected)
