"""The family with torch's machinery: opcheck, compile, export, vmap, torch.func, autocast, what is kept."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import backends, battery
from mmgen_kernels.battery.blocks import BF16, BLOCKS, DIT, FP16, FP32, FP64
from mmgen_kernels.battery.blocks.law import CONSTANT, call
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
SMALL = DIT.but(T=6, head_dim=8, ratio=2)
IMPLEMENTATIONS = battery.implementations("dit_block", CPU)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def arguments(operator, inputs=SMALL, dtypes=(FP32,), **options):
    """By name, floats as leaves; and options."""
    if operator != "adaln_mlp":
        options["num_heads"] = inputs.H
    t = inputs(operator, CPU, dtypes, options, 0)
    return {n: v if n in CONSTANT else v.requires_grad_() for n, v in t.items()}, options


def results(function, t, options):
    """The output and the gradients of every float."""
    out = function(t, options)
    leaves = [v for v in t.values() if v.requires_grad]
    return out, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


# -- opcheck ----------------------------------------------------------------------------------------------------------


def samples(name):
    """Arguments of the operator itself, which reach every branch of its fake."""
    operator = OPERATORS[name.removesuffix("_backward")]
    for inputs, dtypes, keep in (
        (SMALL.but(affine=("weight", "bias")), (FP32,), True),
        (SMALL.but(without=("gate", "gate_msa", "gate_mlp", "shift", "qkv_bias", "fc1_bias")), (FP32, FP32, BF16), True),
        (SMALL.but(B=1, rows=4, integers={"cu_seqlens": (0, 2, 6)}), (FP64,), True),
        (SMALL, (BF16,), False),
    ):
        t, _ = arguments(operator.name, inputs, dtypes)
        known = {"num_heads": inputs.H, "norm": "layer", "eps": 1e-6, "attention_scale": 0.3, "deterministic": True}
        known |= {"activation": "gelu_tanh", "keep": keep, "qk_norm": None, "qk_eps": 1e-6, "interleaved": False}
        given = {n: t.get(n, known.get(n)) for n in operator.inputs}
        if operator.name == name:
            yield tuple(v.detach() if isinstance(v, torch.Tensor) and not keep else v for v in given.values())
        elif keep:
            plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
            outputs = dict(zip(operator.outputs, operator.reference(*plain.values()), strict=True))
            results = [n.removeprefix("grad_") for n in OPERATORS[name].outputs]
            needs = {"needs": [given[n] is not None for n in results]}
            upstream = {"grad_out": torch.randn_like(outputs["out"])}
            yield tuple((plain | outputs | upstream | needs).get(n) for n in OPERATORS[name].inputs)


@pytest.mark.parametrize("name", [f"{block}{suffix}" for block in BLOCKS for suffix in ("", "_backward")])
def test_opcheck(name):
    for given in samples(name):
        torch.library.opcheck(OPERATORS[name].overloads["default"], given)


@pytest.mark.parametrize("activation", ("gelu_tanh", "swiglu"))
@pytest.mark.parametrize("overload", ("default", "reference"))
def test_opcheck_of_the_activation(activation, overload):
    hidden = randn(3, 5, 8, seed=1).float().requires_grad_()
    torch.library.opcheck(OPERATORS["mlp_activation"].overloads[overload], (hidden, activation))
    width = 4 if activation == "swiglu" else 8
    given = (torch.randn(3, 5, width), hidden.detach(), activation, True)
    torch.library.opcheck(OPERATORS["mlp_activation_backward"].overloads[overload], given)


@pytest.mark.parametrize("operator", BLOCKS)
def test_gradcheck(operator):
    t, options = arguments(operator, SMALL.but(T=3, affine=("weight", "bias")), (FP64,))
    names = list(t)
    torch.autograd.gradcheck(lambda *floats: call(operator, dict(zip(names, floats, strict=True)), options), list(t.values()))


@pytest.mark.parametrize("operator", BLOCKS)
def test_gradients_of_some_inputs_alone(operator, implementation):
    """What is frozen, or a LoRA away from it, changes nothing of the rest."""
    t, options = arguments(operator, SMALL.but(affine=("weight",)), norm="rms")
    full = dict(zip(t, results(lambda t, o: call(operator, t, o), t, options)[1:], strict=True))
    for name in t:
        alone = {n: v.detach().requires_grad_(n == name) for n, v in t.items()}
        _, slope = results(lambda t, o: call(operator, t, o), alone, options)
        assert same_bits(slope, full[name]), name


# -- what is kept -----------------------------------------------------------------------------------------------------


def kept_bytes(function):
    """Of what autograd keeps, each storage once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(size for size, _ in storages.values())


def test_a_block_keeps_twelve_activations():
    """x, qkv (3), the attention's output, its projection, the residual, fc1's output (4), fc2's: of (B, T, D) each."""
    B, T, D = 3, 64, 128
    t, options = arguments("dit_block", DIT.but(T=T, H=2, head_dim=64))
    parameters = {v.untyped_storage().data_ptr() for n, v in t.items() if n != "x"}
    assert len(parameters) == len(t) - 1
    of_parameters = sum(v.untyped_storage().nbytes() for n, v in t.items() if n != "x")
    activations = kept_bytes(lambda: call("dit_block", t, options)) - of_parameters
    statistics = 2 * (B * T * 2 * 4) + B * 2 * T * 8  # two norms; the attention's lse in fp64
    assert activations == 12 * B * T * D * 4 + statistics


@pytest.mark.parametrize("operator", BLOCKS)
def test_nothing_is_kept_without_a_gradient_to_come(operator):
    t, options = arguments(operator)
    seen = []
    stock = OPERATORS[operator].reference

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket is getattr(torch.ops.mmgen_kernels, operator):
                seen.append([o.numel() for o in out])
            return out

    assert stock is not None
    with torch.no_grad(), Watch():
        call(operator, t, options)
    with Watch():
        call(operator, t, options)
    assert not any(seen[0][1:]) and all(seen[1][1:])


def test_the_library_epilogue_serves_inference(monkeypatch):
    """torch's product with GELU behind it: exact on the CPU, where cuBLASLt's tanh is what CUDA has."""
    calls = []
    stock = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *a, **k: calls.append(a) or stock(*a, **k))
    t, options = arguments("adaln_mlp", activation="gelu")
    trained = call("adaln_mlp", t, options)
    assert not calls
    with torch.no_grad():
        assert same_bits(call("adaln_mlp", t, options), trained.detach())
        call("adaln_mlp", t, options | {"activation": "gelu_tanh"})
    assert len(calls) == 1


# -- torch.compile and torch.export -----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", BLOCKS)
def test_compile_with_dynamic_shapes(operator, implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda t, o: call(operator, t, o).sin(), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for B, T in ((5, 23), (3, 9), (4, 65)):
        t, options = arguments(operator, SMALL.but(B=B, T=T))
        assert_same(results(compiled, t, options), results(lambda t, o: call(operator, t, o).sin(), t, options))
        frames.append(counter.frame_count)
    assert frames[0] > 0 and len(set(frames)) == 1


def test_export_saved_and_loaded(implementation):
    block = mk.nn.DiTBlock(32, 2)
    torch.nn.init.normal_(block.adaLN_modulation[1].weight)
    samples, tokens = torch.export.Dim("samples", min=2, max=64), torch.export.Dim("tokens", min=2, max=4096)
    given = randn(3, 8, 32, seed=1).float(), randn(3, 32, seed=2).float()
    program = torch.export.export(block, given, dynamic_shapes=({0: samples, 1: tokens}, {0: samples}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for B, T in ((3, 8), (4, 65)):
        given = randn(B, T, 32, seed=1).float(), randn(B, 32, seed=2).float()
        with torch.no_grad():
            torch.testing.assert_close(loaded(*given), block(*given))


# -- torch.func, checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", BLOCKS)
def test_vmap_and_gradients_per_sample(operator, implementation):
    t, options = arguments(operator)
    names = [n for n in t if n != "x"]
    xs = randn(3, *t["x"].shape, seed=5).float()

    def loss(x, *others):
        return call(operator, {"x": x} | dict(zip(names, others, strict=True)), options).square().sum()

    others = [t[n].detach() for n in names]
    numbers = tuple(range(len(names) + 1))
    per_sample = vmap(grad(loss, argnums=numbers), in_dims=(0, *(None,) * len(names)))(xs, *others)
    each = [grad(loss, argnums=numbers)(x, *others) for x in xs]
    assert_same(per_sample, [torch.stack(s) for s in zip(*each, strict=True)])


def test_second_derivative_is_refused():
    t, options = arguments("adaln_mlp")
    (slope,) = torch.autograd.grad(call("adaln_mlp", t, options).square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="adaln_mlp_backward has no derivative; the operator is differentiable once"):
        slope.sum().backward()


@pytest.mark.parametrize("operator", BLOCKS)
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(operator, reentrant):
    t, options = arguments(operator)
    names = list(t)

    def function(*floats):
        return call(operator, dict(zip(names, floats, strict=True)), options)

    for slopes in (lambda out: torch.autograd.grad(out.square().sum(), list(t.values())),):
        expected = slopes(function(*t.values()))
        if reentrant:  # which takes backward alone
            checkpoint(function, *t.values(), use_reentrant=True).square().sum().backward()
            assert_same([v.grad for v in t.values()], expected)
        else:
            assert_same(slopes(checkpoint(function, *t.values(), use_reentrant=False)), expected)


# -- autocast and choice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("operator", BLOCKS)
def test_autocast(operator, dtype, compiled):
    """Projections are cast, the residual stream is not; gradients come back in the dtype of the inputs."""
    t, options = arguments(operator)
    cast = {n: v.to(dtype) if n.startswith(("qkv", "proj", "fc")) else v for n, v in t.items()}
    function = lambda t, o: call(operator, t, o)  # noqa: E731
    expected = torch.autograd.grad(function(cast, options).square().sum(), list(t.values()))
    called = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.autocast("cpu", dtype):
        out = called(t, options)
    assert out.dtype == FP32
    assert_same([out], [function(cast, options)])
    assert_same(torch.autograd.grad(out.square().sum(), list(t.values())), expected)


def test_choice_is_that_of_the_parts():
    with pytest.raises(RuntimeError, match=r"use_backend\('cuda'\) cannot serve adaln:"), mk.use_backend("cuda"):
        call("dit_block", *arguments("dit_block"))
    assert "dit_block on cpu: by what serves adaln, qk_norm_rope, attention, mlp_activation" in mk.backend_report()
    assert backends.reasons_against(OPERATORS["dit_block"], "torch", "cpu")[0] == "adaln has no torch kernel"


def test_other_streams_of_a_packed_batch_are_not_seen():
    """Sequences of a packed batch give what they give alone."""
    t, options = arguments("dit_block", SMALL.but(B=1, T=9, vectors=(), integers={"cu_seqlens": (0, 4, 9)}))
    whole = call("dit_block", t, options)
    del t["cu_seqlens"]
    parts = [call("dit_block", t | {"x": x}, options) for x in t["x"].split((4, 5), 1)]
    torch.testing.assert_close(whole, torch.cat(parts, 1))


def test_attention_is_that_of_torch():
    """timm's order of q, k, v and heads."""
    t, options = arguments("adaln_attention", SMALL.but(without=("shift", "scale", "gate")))
    h = F.layer_norm(t["x"], t["x"].shape[-1:], eps=1e-6)
    B, T, D = h.shape
    qkv = F.linear(h, t["qkv_weight"], t["qkv_bias"]).reshape(B, T, 3, SMALL.H, D // SMALL.H).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(B, T, D)
    torch.testing.assert_close(call("adaln_attention", t, options), t["x"] + F.linear(attended, t["proj_weight"], t["proj_bias"]))
