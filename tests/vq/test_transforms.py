"""torch.vmap and torch.func: a transformed call equals the loop that it stands for."""

import pytest
import torch
import torch._dynamo.exc
from called import Called
from torch.func import functional_call, grad, jacrev, vjp, vmap

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.vq import ops

IMPLEMENTATIONS = battery.implementations("vector_quantize", torch.device("cpu"))
B, H, N, K, D = 3, 2, 11, 7, 5

# name -> shapes of x, codebook and mask per sample and their batch axes; None: no batch, or no mask
BATCHES = {
    "x": ((N, D), (K, D), None, (0, None, None)),
    "x_last_axis": ((N, D), (K, D), None, (-1, None, None)),
    "x_rank_1": ((D,), (K, D), None, (0, None, None)),
    "x_rank_4": ((2, 3, 4, D), (K, D), None, (1, None, None)),
    "codebook": ((N, D), (K, D), None, (None, 0, None)),
    "codebook_middle_axis": ((N, D), (K, D), None, (None, 1, None)),
    "both": ((N, D), (K, D), None, (0, 0, None)),
    "both_other_axes": ((N, D), (K, D), None, (1, 2, None)),
    "x_rank_1_both": ((D,), (K, D), None, (0, 0, None)),
    "heads_x": ((H, N, D), (H, K, D), None, (0, None, None)),
    "heads_codebook": ((H, N, D), (H, K, D), None, (None, 0, None)),
    "heads_both": ((H, N, D), (H, K, D), None, (1, 2, None)),
    "heads_no_rows_axis": ((H, D), (H, K, D), None, (0, None, None)),
    "mask_shared": ((N, D), (K, D), (N,), (0, None, None)),
    "mask_only": ((N, D), (K, D), (N,), (None, None, 0)),
    "mask_all": ((N, D), (K, D), (N,), (0, 0, 1)),
    "mask_heads": ((H, N, D), (H, K, D), (H, N), (0, None, 0)),
    "mask_heads_only": ((H, N, D), (H, K, D), (H, N), (None, None, 1)),
    "mask_heads_codebook": ((H, N, D), (H, K, D), (H, N), (None, 0, None)),
    "no_rows": ((0, D), (K, D), None, (0, None, None)),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def batched(shape, axis, seed):
    if axis is None:
        return randn(*shape, seed=seed).float()
    return randn(B, *shape, seed=seed).float().movedim(0, axis)


def arguments(name):
    *shapes, axes = BATCHES[name]
    x, codebook = (batched(s, a, seed) for seed, (s, a) in enumerate(zip(shapes[:2], axes[:2], strict=True)))
    mask = None if shapes[2] is None else batched(shapes[2], axes[2], 9) > -0.5
    return (x, codebook, mask), axes


def loop(function, tensors, axes):
    """What vmap stands for: one call per sample, stacked."""
    found = [
        function(*(t if a is None or t is None else t.select(a, i) for t, a in zip(tensors, axes, strict=True))) for i in range(B)
    ]
    return torch.stack(found) if isinstance(found[0], torch.Tensor) else tuple(torch.stack(o) for o in zip(*found, strict=True))


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("name", BATCHES)
def test_vmap_of_nearest_code(implementation, name, metric):
    tensors, axes = arguments(name)

    def function(x, codebook, mask):
        return mk.nearest_code(x, codebook, mask=mask, metric=metric)

    assert torch.equal(vmap(function, in_dims=axes)(*tensors), loop(function, tensors, axes))


@pytest.mark.parametrize("name", BATCHES)
def test_vmap_of_vector_quantize(implementation, name):
    tensors, axes = arguments(name)

    def function(x, codebook, mask):
        return tuple(mk.vector_quantize(x, codebook, mask=mask))

    for got, expected in zip(vmap(function, in_dims=axes)(*tensors), loop(function, tensors, axes), strict=True):
        assert torch.equal(got, expected)


def test_vmap_twice(implementation):
    x, codebook = randn(B, 4, N, D, seed=1).float(), randn(4, K, D, seed=2).float()
    got = vmap(vmap(mk.nearest_code), in_dims=(0, None))(x, codebook)
    assert torch.equal(got, torch.stack([torch.stack([mk.nearest_code(x[b, i], codebook[i]) for i in range(4)]) for b in range(B)]))


def test_vmap_runs_the_implementation_that_was_asked_for(implementation):
    """A rule that called the default overload would quietly run the C++ kernel inside use_backend("reference")."""
    (x, codebook, _), _ = arguments("both")
    with Called() as called:
        vmap(mk.nearest_code)(x, codebook)
        vmap(lambda a, b: mk.vector_quantize(a, b).loss)(x, codebook)
    assert {overload._overloadname for overload in called.ours} == {"reference" if implementation == "reference" else "default"}


def loss(x, codebook, mask=None, gradient="straight_through"):
    out = mk.vector_quantize(x, codebook, mask=mask, gradient=gradient)
    return out.loss + (out.quantized * torch.linspace(0, 1, x.shape[-1])).sum()


def eager_gradients(x, codebook, *rest):
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    return torch.autograd.grad(loss(x, codebook, *rest), (x, codebook))


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
def test_func_grad(implementation, gradient):
    (x, codebook, _), _ = arguments("x")
    x = x[0]
    got = grad(loss, argnums=(0, 1))(x, codebook, None, gradient)
    for a, b in zip(got, eager_gradients(x, codebook, None, gradient), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(grad(loss)(x, codebook, None, gradient), got[0])


@pytest.mark.parametrize("name", [n for n in BATCHES if n != "no_rows"])
def test_vmap_of_grad(implementation, name):
    """Gradients per sample."""
    tensors, axes = arguments(name)
    got = vmap(grad(loss, argnums=(0, 1)), in_dims=axes)(*tensors)
    for a, b in zip(got, loop(eager_gradients, tensors, axes), strict=True):
        assert torch.equal(a, b)


def test_grad_of_vmap(implementation):
    (x, codebook, _), _ = arguments("x")
    got = grad(lambda c: vmap(loss, in_dims=(0, None))(x, c).sum())(codebook)
    expected = sum(eager_gradients(rows, codebook)[1] for rows in x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_vjp_and_jacrev(implementation):
    (x, codebook, _), _ = arguments("x")
    x = x[0]
    out, pull = vjp(lambda a: mk.vector_quantize(a, codebook).quantized, x)
    upstream = torch.randn_like(x)
    assert torch.equal(pull(upstream)[0], upstream) and torch.equal(out, codebook[mk.nearest_code(x, codebook)])
    jacobian = jacrev(lambda a: mk.vector_quantize(a, codebook).quantized)(x[:2])
    assert torch.equal(jacobian.reshape(2 * D, 2 * D), torch.eye(2 * D))


def test_grad_has_aux(implementation):
    (x, codebook, _), _ = arguments("x")

    def with_indices(a):
        out = mk.vector_quantize(a, codebook)
        return out.loss, out.indices

    gradient, indices = grad(with_indices, has_aux=True)(x[0])
    assert torch.equal(indices, mk.nearest_code(x[0], codebook)) and gradient.shape == x[0].shape


def test_functional_call_of_a_module(implementation):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codebook = torch.nn.Parameter(randn(K, D, seed=3).float())

        def forward(self, x):
            return mk.vector_quantize(x, self.codebook).loss

    module, x = Module(), randn(B, N, D, seed=1).float()
    parameters = dict(module.named_parameters())
    per_sample = vmap(grad(lambda p, rows: functional_call(module, p, (rows,))), in_dims=(None, 0))(parameters, x)
    for rows, got in zip(x, per_sample["codebook"], strict=True):
        (expected,) = torch.autograd.grad(module(rows), module.codebook)
        assert torch.equal(got, expected)


def test_second_derivative_is_refused(implementation):
    (x, codebook, _), _ = arguments("x")
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda a: grad(loss)(a, codebook).sum())(x[0])


def test_forward_mode_is_refused(implementation):
    (x, codebook, _), _ = arguments("x")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
        torch.func.jvp(lambda a: mk.vector_quantize(a, codebook).loss, (x[0],), (x[0],))


def test_compiled_vmap(implementation):
    (x, codebook, _), _ = arguments("both")
    compiled = torch.compile(vmap(mk.nearest_code), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, codebook), vmap(mk.nearest_code)(x, codebook))


@pytest.mark.xfail(
    strict=True,
    raises=torch._dynamo.exc.TorchRuntimeError,
    reason="torch.library.register_autograd makes functions that functorch refuses inside a compiled function (torch 2.13)",
)
def test_compiled_func_grad(implementation):
    (x, codebook, _), _ = arguments("x")
    compiled = torch.compile(grad(loss, argnums=(0, 1)), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x[0], codebook), eager_gradients(x[0], codebook), strict=True):
        assert torch.equal(a, b)
