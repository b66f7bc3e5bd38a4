"""vq_diffusion_loss with torch's machinery: opcheck, compile, export, vmap, torch.func, autocast, checkpoints."""

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
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.schedule.discrete import KEPT
from mmgen_kernels.library import OPERATORS

K = 9
ROWS = mk.transition_table(KEPT, K, gammas_cumprod=0.9 * (1 - KEPT))
NAME = "vq_diffusion_loss"


@pytest.fixture(params=battery.implementations(NAME, torch.device("cpu")))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def given(*shape):
    """logits, x0, x_t, steps"""
    logits = randn(*shape, K, seed=1).float().requires_grad_()
    return logits, randint(0, K, shape, 2), randint(K - 4, K + 1, shape, 3), torch.arange(shape[0]) % 5


def training(logits, x0, x_t, steps):
    """All that is differentiable, of both layouts."""
    found = mk.vq_diffusion_loss(logits, x0, x_t, ROWS, steps, aux_weight=0.1, weight=steps + 1.0)
    turned = mk.vq_diffusion_loss(logits.mT, x0, x_t, ROWS, steps, dim=1, reduction="places", mask=x0 > 2)
    return *found, turned.loss, turned.vb


def slopes(outputs, logits):
    return torch.autograd.grad(sum((i + 1) * o.sum() for i, o in enumerate(outputs)), logits)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


def samples(name):
    logits, x0, x_t, steps = given(3, 5)
    weight, mask = torch.rand(3), torch.rand(3, 5) > 0.3
    half = logits.detach().mT.contiguous().bfloat16().requires_grad_()
    for arguments in (
        (logits, x0, x_t, ROWS, None, None, None, None, 2, None, False, "mean"),
        (half, x0, x_t, ROWS, steps, weight, None, mask, 0, 0.1, True, "none"),
        (logits.detach().double().requires_grad_(), x0, x_t, ROWS, steps, weight, weight, None, 0, None, False, "places"),
    ):
        forward = OPERATORS[NAME]
        if name == NAME:
            yield arguments
            continue
        known = {n: a.detach() if isinstance(a, torch.Tensor) else a for n, a in zip(forward.inputs, arguments, strict=True)}
        known |= dict(zip(forward.outputs, forward.reference(*known.values()), strict=True))
        known |= {f"grad_{n}": torch.randn_like(known[n]) for n in forward.outputs}
        yield tuple(known.get(n) for n in OPERATORS[name].inputs)


@each_overload(with_backward(NAME))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


def test_compile_with_dynamic_shapes(implementation):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for B, N in ((3, 20), (5, 12), (4, 33), (7, 2)):
        arguments = given(B, N)
        expected, found = training(*arguments), compiled(*arguments)
        assert_same((*found, *slopes(found, arguments[0])), (*expected, *slopes(expected, arguments[0])))
        graphs.append(counter.frame_count)
    assert len(set(graphs[1:])) == 1


def test_export_saved_and_loaded(implementation):
    class Losses(torch.nn.Module):
        def forward(self, logits, x0, x_t, steps):
            return training(logits, x0, x_t, steps)

    def detached(*shape):
        logits, *rest = given(*shape)
        return logits.detach(), *rest

    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("N")}
    program = torch.export.export(Losses(), detached(3, 6), dynamic_shapes=(sizes, sizes, sizes, {0: sizes[0]}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(*detached(4, 9)), Losses()(*detached(4, 9)))


def test_vmap_and_func_grad(implementation):
    def total(logits, x0, x_t, steps):
        return sum(o.sum() for o in training(logits, x0, x_t, steps))

    logits, x0, x_t, _ = given(3, 4, 5)
    steps = torch.arange(12).view(3, 4) % 6
    each = [grad(total)(*(v[i] for v in (logits, x0, x_t, steps))) for i in range(3)]
    assert_same([vmap(grad(total))(logits, x0, x_t, steps)], [torch.stack(each)])


def test_autocast_inference_mode_and_checkpoint(implementation):
    arguments = given(3, 8)
    expected = training(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(training(*arguments), expected)
    with torch.inference_mode():
        assert_same(training(*arguments), expected)
    again = checkpoint(lambda: training(*arguments), use_reentrant=False)
    assert_same(slopes(again, arguments[0]), slopes(expected, arguments[0]))


def test_a_second_derivative_is_refused(implementation):
    logits, x0, x_t, steps = given(3, 8)
    (slope,) = torch.autograd.grad(mk.vq_diffusion_loss(logits, x0, x_t, ROWS, steps).loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NAME}_backward has no derivative; the operator is differentiable once"):
        slope.sum().backward()


def test_one_operator_forward_and_one_backward():
    logits, x0, x_t, steps = given(3, 8)
    with Called() as forward:
        found = mk.vq_diffusion_loss(logits, x0, x_t, ROWS, steps, aux_weight=0.1).loss
    with Called() as backward:
        torch.autograd.grad(found, logits, torch.ones_like(found))
    assert set(forward.names) <= {NAME, "detach", "alias"} and forward.names.count(NAME) == 1
    assert set(backward.names) <= {f"{NAME}_backward", "ones_like", "detach", "alias"} and f"{NAME}_backward" in backward.names


def test_the_reference_reads_nothing_back():
    arguments = given(3, 8)
    with mk.use_backend("reference"), Called() as called:
        slopes(training(*arguments), arguments[0])
    assert not called.reads
