"""residual_quantize with torch's machinery, and what it refuses. opcheck: test_registration.py."""

import pytest
import torch
from test_residual_quantize import FP32, IMPLEMENTATIONS, assert_same, inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

import mmgen_kernels as mk
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.vq.residual_quantize import gaussian
from mmgen_kernels.vq import ops

META = torch.device("meta")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def outputs_and_gradients(function, x, codebooks):
    x, codebooks = x.detach().requires_grad_(), codebooks.detach().requires_grad_()
    out = function(x, codebooks)
    (out.loss.sum() + (out.quantized * torch.linspace(0, 1, x.shape[-1])).sum()).backward()
    return [*out[:3], x.grad, codebooks.grad]


def test_compile_with_dynamic_shapes(implementation):
    def function(x, codebooks):
        return mk.residual_quantize(x, codebooks, gradient="rotation")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows, codes, levels in ((23, 9, 3), (5, 8, 4), (64, 17, 2)):
        given = [t.float() for t in gaussian(rows, codes, 6, FP32, levels=levels)]
        assert_same(outputs_and_gradients(compiled, *given), outputs_and_gradients(function, *given))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # sizes are not specialised on
    x, codebooks = gaussian(24, 9, 6, FP32)
    for leading in ((2, 3, 4), (24,)):
        given = x.view(*leading, 6), codebooks
        assert_same(outputs_and_gradients(compiled, *given), outputs_and_gradients(function, *given))


def test_compile_with_levels_mask_and_sizes(implementation):
    compiled = torch.compile(mk.residual_quantize, fullgraph=True, dynamic=True, backend="aot_eager")
    x, codebooks = gaussian(24, 9, 6, FP32, levels=3)
    x, mask, books = x.view(4, 6, 6), torch.rand(4, 6) > 0.3, [*codebooks[:2], codebooks[2, :4]]
    for options in ({"levels": 2}, {"levels": 0}, {"levels": torch.tensor([3, 1, 0, 2])}, {"mask": mask}):
        for given in (codebooks, books):
            assert_same(compiled(x, given, **options)[:3], mk.residual_quantize(x, given, **options)[:3])


def test_export(implementation):
    class Quantizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codebooks = torch.nn.ParameterList(torch.randn(k, 6) for k in (9, 4))

        def forward(self, x):
            return mk.residual_quantize(x, self.codebooks)[:3]

    module = Quantizer()
    shapes = ({0: torch.export.Dim("rows", min=2, max=4096)},)
    program = torch.export.export(module, (torch.randn(8, 6),), dynamic_shapes=shapes).module()
    for rows in (8, 3, 100):
        x = torch.randn(rows, 6)
        assert_same(program(x), module(x))


@pytest.mark.parametrize("axes", ((0, None), (None, 0), (1, 2)))
def test_vmap_and_gradients_per_sample(implementation, axes):
    shapes = ((11, 5), (3, 7, 5))
    tensors = [randn(*s, seed=1) if a is None else randn(2, *s, seed=1).movedim(0, a) for s, a in zip(shapes, axes, strict=True)]

    def loss(x, codebooks):
        out = mk.residual_quantize(x, codebooks, levels=2)
        return out.loss.sum() + (out.quantized * torch.linspace(0, 1, 5)).sum()

    def eager(i):
        x, codebooks = (t if a is None else t.select(a, i) for t, a in zip(tensors, axes, strict=True))
        x, codebooks = x.detach().requires_grad_(), codebooks.detach().requires_grad_()
        return torch.autograd.grad(loss(x, codebooks), (x, codebooks))

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=axes)(*tensors)
    for sample in range(2):
        assert_same([g[sample] for g in got], eager(sample))


def test_vmap_over_levels_and_mask(implementation):
    x, codebooks = randn(2, 3, 4, 5, seed=1), randn(3, 7, 5, seed=2)
    levels, mask = torch.tensor([[0, 1, 3], [2, 3, 9]]), randn(2, 3, 4, seed=3) > -0.5

    def function(x, levels, mask):
        return tuple(mk.residual_quantize(x, codebooks, levels=levels, mask=mask, statistics=True))

    got = vmap(function)(x, levels, mask)
    for sample in range(2):
        assert_same([g[sample] for g in got], function(x[sample], levels[sample], mask[sample]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_changes_nothing(implementation, dtype):
    x, codebooks = (t.detach() for t in inputs(dtype=torch.float32))
    expected = outputs_and_gradients(mk.residual_quantize, x, codebooks)
    with torch.autocast("cpu", dtype):
        assert_same(outputs_and_gradients(mk.residual_quantize, x, codebooks), expected)


def test_double_backward_is_refused(implementation):
    x, codebooks = inputs()
    out = mk.residual_quantize(x, codebooks, gradient="rotation")
    (gradient,) = torch.autograd.grad(out.loss.sum() + out.quantized.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_quantize_backward has no derivative"):
        gradient.sum().backward()


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="the C++ part is not built")
def test_sizes_that_do_not_add_up_are_refused_in_a_direct_call():
    with pytest.raises(RuntimeError, match="sizes must add up to the codes of codebooks"):
        torch.ops.mmgen_kernels.residual_quantize(
            torch.ones(2, 3), torch.ones(5, 3), [4, 4], None, None, 2, 0.25, "straight_through", "l2", "exact", False
        )


# -- bad input --------------------------------------------------------------------------------------------------------

X, C = torch.zeros(5, 4), torch.zeros(2, 3, 4)
LEVELS = torch.zeros(5, dtype=torch.int64)
BAD = {
    "x_list": ([[0.0]], C, {}, TypeError, "x must be a tensor, got list"),
    "x_int": (X.int(), C, {}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int32"),
    "x_rank_0": (torch.tensor(1.0), C, {}, ValueError, r"x must be \(..., D\) with the codebooks' D = 4, got shape \(\)"),
    "dim": (X[:, :3], C, {}, ValueError, r"x must be \(..., D\) with the codebooks' D = 4, got shape \(5, 3\)"),
    "codebooks_none": (X, None, {}, TypeError, "codebooks must be a tensor or a sequence of tensors, got NoneType"),
    "codebooks_int": (X, C.int(), {}, TypeError, "codebooks must be float64, .*got torch.int32"),
    "codebooks_rank_2": (X, C[0], {}, ValueError, r"codebooks must be \(L, K, D\) with L >= 1, .*got shape \(3, 4\)"),
    "no_levels": (X, C[:0], {}, ValueError, r"codebooks must be \(L, K, D\) with L >= 1, .*got shape \(0, 3, 4\)"),
    "no_codes": (X, C[:, :0], {}, ValueError, r"codebooks must hold 1 to 2\^31 - 1 codes, got K = 0"),
    "empty_sequence": (X, [], {}, ValueError, "codebooks must hold at least one level, got an empty sequence"),
    "sequence_of_lists": (X, [[0.0]], {}, TypeError, r"codebooks\[0\] must be a tensor, got list"),
    "sequence_rank": (X, [C[0], C], {}, ValueError, r"codebooks\[1\] must be \(K, 4\), got shape \(2, 3, 4\)"),
    "sequence_dim": (X, [C[0], C[0, :, :2]], {}, ValueError, r"codebooks\[1\] must be \(K, 4\), got shape \(3, 2\)"),
    "sequence_no_codes": (X, [C[0], C[0, :0]], {}, ValueError, r"codebooks\[1\] must hold 1 to 2\^31 - 1 codes, got K = 0"),
    "sequence_device": (X, [C[0], C[0].to(META)], {}, ValueError, r"codebooks\[1\] must be on .*device cpu, got meta"),
    "device": (X, C.to(META), {}, ValueError, "codebooks must be on x's device cpu, got meta"),
    "mask": (X, C, {"mask": torch.ones(5)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    "mask_shape": (X, C, {"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must have .*shape \(5,\), got \(4,\)"),
    "metric": (X, C, {"metric": "l1"}, ValueError, "metric must be one of l2, cosine, dot, got 'l1'"),
    "precision": (X, C, {"precision": "high"}, ValueError, "precision must be one of exact, fast, got 'high'"),
    "gradient": (X, C, {"gradient": "st"}, ValueError, "gradient must be one of straight_through, rotation, got 'st'"),
    "beta": (X, C, {"beta": torch.tensor(0.25)}, TypeError, "beta must be a number, got Tensor"),
    "statistics": (X, C, {"statistics": torch.tensor(True)}, TypeError, "statistics must be a bool, .*got Tensor"),
    "levels_negative": (X, C, {"levels": -1}, ValueError, r"levels must be in 0..2, got -1"),
    "levels_many": (X, C, {"levels": 3}, ValueError, r"levels must be in 0..2, got 3"),
    "levels_bool": (X, C, {"levels": True}, TypeError, "levels must be an int or an int64 tensor, got bool"),
    "levels_float": (X, C, {"levels": 1.0}, TypeError, "levels must be an int or an int64 tensor, got float"),
    "levels_dtype": (X, C, {"levels": LEVELS.int()}, TypeError, "levels must be an int or an int64 tensor, got torch.int32"),
    "levels_shape": (X, C, {"levels": LEVELS[:4]}, ValueError, r"levels must be \(B,\) .*got \(4,\) for x \(5, 4\)"),
    "levels_without_samples": (X[0], C, {"levels": LEVELS[:4]}, ValueError, r"levels must be \(B,\) .*got \(4,\) for x \(4,\)"),
    "levels_device": (X, C, {"levels": LEVELS.to(META)}, ValueError, "levels must be on x's device cpu, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    x, codebooks, others, error, message = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        mk.residual_quantize(x, codebooks, **others)


@pytest.mark.parametrize("beta", (0.0, -1.0, 1e30, float("inf"), float("nan")))
def test_values_never_raise(implementation, beta):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0])
    x, codebooks = bad[torch.randint(0, 5, (64, 4))].requires_grad_(), bad[torch.randint(0, 5, (3, 33, 4))].requires_grad_()
    for metric in ops.METRICS:
        out = mk.residual_quantize(x, codebooks, beta=beta, metric=metric, gradient="rotation", statistics=True)
        assert ((out.indices >= 0) & (out.indices < 33)).all()
        (out.loss.sum() + out.quantized.sum()).backward()
