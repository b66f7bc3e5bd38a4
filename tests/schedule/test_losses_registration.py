"""The losses with torch's machinery: opcheck, gradcheck, compile, export, vmap, torch.func, autocast, checkpoints."""

import io

import pytest
import torch
from called import Called
from overloads import each_overload, with_backward
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.schedule.law import BF16, FP32, FP64
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")
TABLE = mk.hybrid_table(torch.linspace(1e-3, 0.3, 20))
NAMES = ("diffusion_loss", "hybrid_loss")


@pytest.fixture(params=battery.implementations("hybrid_loss", CPU))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def given(*shape, dtype=FP32):
    """output of twice the channels, x0, noise"""
    x0, noise = randn(*shape, seed=1).tanh(), randn(*shape, seed=2)
    output = torch.cat((noise + 0.1 * randn(*shape, seed=3), randn(*shape, seed=4)), 1)
    return output.to(dtype).requires_grad_(), x0.to(dtype), noise.to(dtype)


def times(B):
    return torch.arange(B) * 3


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


def training(output, x0, noise, t, weight):
    """All that is differentiable, of both."""
    found = mk.hybrid_loss(output, x0, noise, t, table=TABLE, objective="kl", clamp=1.0)
    mse = mk.diffusion_loss(output[:, : x0.shape[1]], noise, weight=weight, kind="pseudo_huber", delta=0.1)
    return (*found, mse)


def slopes(outputs, inputs):
    return torch.autograd.grad(sum((i + 1) * o.sum() for i, o in enumerate(outputs)), inputs)


def samples(name):
    """Arguments that reach every branch of an operator's fake and schema."""
    output, x0, noise = given(3, 2, 5)
    target, weight, deltas = x0.clone().requires_grad_(), torch.rand(3).requires_grad_(), torch.rand(3)
    mask = torch.rand(3, 1, 5) > 0.3
    calls = {
        "diffusion_loss": [
            (output, torch.cat((target, target), 1), weight, None, None, "mse", 1.0, True),
            (output.to(BF16), noise.repeat(1, 2, 1), None, mask, deltas, "pseudo_huber", 1.0, False),
        ],
        "hybrid_loss": [
            (output, x0, noise, times(3), TABLE, 1.0, False, None),
            (output, x0.double(), noise, times(3), TABLE, 20.0, True, 0.7),
        ],
    }
    forward = OPERATORS[name.removesuffix("_backward")]
    for arguments in calls[forward.name]:
        if name == forward.name:
            yield arguments
            continue
        known = {n: a.detach() if isinstance(a, torch.Tensor) else a for n, a in zip(forward.inputs, arguments, strict=True)}
        known |= dict(zip(forward.outputs, forward.reference(*known.values()), strict=True))
        known |= {f"grad_{n}": torch.randn_like(known[n]) for n in forward.outputs}
        known |= {f"need_grad_{n}": known[n] is not None for n in forward.inputs}
        yield tuple(known.get(n) for n in OPERATORS[name].inputs)


@each_overload(with_backward(*NAMES))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


def test_gradcheck(implementation):
    output, x0, noise = given(3, 2, 4, dtype=FP64)
    t = torch.tensor([0, 4, 19])
    for options in ({}, {"objective": "kl"}, {"objective": "kl", "clamp": 0.9}):

        def losses(output, options=options):
            found = mk.hybrid_loss(output, x0, noise, t, table=TABLE, **options)
            # the bound, whose mean is detached, has no derivative that a finite difference sees
            return found if "objective" in options else found.mse

        torch.autograd.gradcheck(losses, (output,))
    fixed = mk.hybrid_table(torch.linspace(1e-3, 0.3, 20), variance="fixed_small")
    prediction = output.detach()[:, :2].clone().requires_grad_()
    torch.autograd.gradcheck(lambda p: mk.hybrid_loss(p, x0, noise, t, table=fixed, objective="kl"), (prediction,))

    target, weight = randn(3, 4, 4, seed=7).requires_grad_(), randn(3, seed=8).requires_grad_()
    mask, deltas = randn(3, 1, 4, seed=9) > -0.5, torch.tensor([0.2, 0.5, 1.0])
    for kind in ("mse", "huber", "smooth_l1", "pseudo_huber"):
        for reduction in ("mean", "none"):

            def loss(output, target, weight, kind=kind, reduction=reduction):
                return mk.diffusion_loss(output, target, weight=weight, kind=kind, delta=deltas, mask=mask, reduction=reduction)

            torch.autograd.gradcheck(loss, (output, target, weight))


def test_compile_with_dynamic_shapes_and_a_change_of_rank(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for B, C, W in ((3, 2, 23), (5, 3, 9), (4, 4, 64), (7, 2, 5)):
        output, x0, noise = given(B, C, W)
        weight = torch.rand(B).requires_grad_()
        expected = training(output, x0, noise, times(B), weight)
        found = compiled(output, x0, noise, times(B), weight)
        assert_same((*found, *slopes(found, (output, weight))), (*expected, *slopes(expected, (output, weight))))
        graphs.append(counter.frame_count)
    assert len(set(graphs[1:])) == 1  # sizes are not specialised on
    for shape in ((9, 4), (3, 2, 4, 2)):
        output, x0, noise = given(*shape)
        weight = torch.rand(shape[0])
        assert_same(compiled(output, x0, noise, times(len(x0)), weight), training(output, x0, noise, times(len(x0)), weight))


def test_export_saved_and_loaded(implementation):
    class Losses(torch.nn.Module):
        def forward(self, output, x0, noise, t):
            weight = mk.loss_weight(t, table=TABLE[:, 0].abs() / 2)
            return training(output, x0, noise, t, weight)

    output, x0, noise = (v.detach() for v in given(3, 4, 6))
    program = torch.export.export(Losses(), (output, x0, noise, times(3)), dynamic_shapes=({0: torch.export.Dim("B")},) * 4)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    given_now = (*(v.detach() for v in given(5, 4, 6)), times(5))
    assert_same(loaded(*given_now), Losses()(*given_now))


def test_vmap_and_func_grad(implementation):
    def total(output, x0, noise, weight):
        return sum(o.sum() for o in training(output, x0, noise, times(2), weight))

    arguments = [torch.stack(v) for v in zip(*(given(2, 3, 5) for _ in range(3)), strict=True)]
    arguments = [(v.detach() * (1 + torch.arange(3).view(3, 1, 1, 1) / 9)) for v in arguments] + [torch.rand(3, 2)]
    each = [grad(total, argnums=(0, 3))(*(v[i] for v in arguments)) for i in range(3)]
    assert_same(vmap(grad(total, argnums=(0, 3)))(*arguments), [torch.stack(g) for g in zip(*each, strict=True)])
    found = vmap(lambda o, x, z, w: training(o, x, z, times(2), w))(*arguments)
    assert_same(found, [torch.stack(o) for o in zip(*(training(*(v[i] for v in arguments[:3]), times(2), arguments[3][i])
                                                      for i in range(3)), strict=True)])  # fmt: skip


def test_autocast_casts_nothing(implementation):
    output, x0, noise = given(3, 2, 8)
    expected = training(output, x0, noise, times(3), None)
    with torch.autocast("cpu", BF16):
        assert_same(training(output, x0, noise, times(3), None), expected)


def test_inference_mode_checkpoint_and_second_derivative(implementation):
    output, x0, noise = given(3, 2, 8)
    expected = training(output, x0, noise, times(3), None)
    with torch.inference_mode():
        assert_same(training(output.detach(), x0, noise, times(3), None), expected)
    again = checkpoint(lambda: training(output, x0, noise, times(3), None), use_reentrant=False)
    assert_same(slopes(again, (output,)), slopes(expected, (output,)))
    for name, loss in (
        ("diffusion_loss", lambda: mk.diffusion_loss(output, torch.zeros_like(output))),
        ("hybrid_loss", lambda: mk.hybrid_loss(output, x0, noise, times(3), table=TABLE).loss.sum()),
    ):
        (slope,) = torch.autograd.grad(loss(), output, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}_backward has no derivative; the operator is differentiable once"):
            slope.sum().backward()


# -- no waiting for a device ------------------------------------------------------------------------------------------


def test_one_operator_forward_and_one_backward_and_nothing_is_read_back():
    output, x0, noise = given(3, 2, 8)
    weight, mask = torch.rand(3), torch.rand(3, 1, 8) > 0.5
    for name, loss in (
        ("diffusion_loss", lambda: mk.diffusion_loss(output, output.detach() * 2, weight=weight, mask=mask.repeat(1, 4, 1))),
        ("hybrid_loss", lambda: mk.hybrid_loss(output, x0, noise, times(3), table=TABLE, objective="kl", clamp=1.0).loss),
    ):
        with Called() as forward:
            found = loss()
        with Called() as backward:
            torch.autograd.grad(found, output, torch.ones_like(found))
        assert [n for n in forward.names if n.startswith(name)] == [name] and forward.reads == []
        assert [n for n in backward.names if n.startswith(name)] == [f"{name}_backward"] and backward.reads == []
        own = {"detach", "arange", "ones_like", "mul", "repeat", "view", "alias"}  # of this test and of autograd
        assert not {*forward.names, *backward.names} - {name, f"{name}_backward"} - own


def test_a_weight_and_the_reference_read_nothing_back():
    output, x0, noise = given(3, 2, 8)
    with mk.use_backend("reference"), Called() as called:
        weight = mk.loss_weight(times(3), table=TABLE[:, 0].abs() / 2)
        for losses in (training(output, x0, noise, times(3), weight), training(output, x0, noise, times(3), None)):
            slopes(losses, (output,))
        for kind in ("sigma_sqrt", "cosmap", "logit_normal", "edm"):
            mk.loss_weight(weight, kind=kind)
    assert called.reads == []
