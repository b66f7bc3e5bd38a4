"""Every registered operator and overload with torch's machinery: opcheck, compile, export, autocast, double backward."""

import io
import itertools
import os
import subprocess
import sys

import pytest
import torch
from overloads import each_overload
from torch._dynamo.testing import CompileCounterWithBackend

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.vq import ops

IMPLEMENTATIONS = battery.implementations("vector_quantize", torch.device("cpu"))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def samples(name):
    """Arguments that reach every branch of an operator's fake and schema. Called per overload: opcheck may keep the tensors."""
    x, codebook = torch.randn(2, 5, 4), torch.randn(7, 4)
    permuted = torch.randn(2, 4, 5).transpose(1, 2)  # dense, and not contiguous
    mask = torch.rand(2, 5) > 0.3
    heads = torch.randn(2, 7, 4)
    if name == "nearest_code":
        yield from ((x, codebook, None, metric, precision) for metric in ops.METRICS for precision in ops.PRECISIONS)
        yield permuted, codebook.t().contiguous().t(), mask, "l2", "exact"
        yield x, heads, mask, "l2", "exact"
        yield x.bfloat16(), codebook, None, "l2", "exact"
        yield x[:, :0], codebook, None, "l2", "exact"
        yield x[0, 0], codebook, None, "l2", "exact"
    elif name == "vector_quantize":
        for tensors in ((x, codebook, None), (permuted, codebook, mask), (x, heads, mask), (x.half(), codebook.bfloat16(), None)):
            for gradient in ops.GRADIENTS:
                rows, codes, valid = tensors
                yield rows.detach().requires_grad_(), codes.detach().requires_grad_(), valid, 0.25, False, gradient, "l2", "exact"
        yield x, codebook.requires_grad_(), None, 1.0, True, "straight_through", "cosine", "fast"
    elif name == "vector_quantize_backward":
        for codes, rows in ((codebook, x), (heads, x), (codebook, permuted), (codebook, x.bfloat16())):
            quantized, indices, loss, *_ = OPERATORS["vector_quantize"].reference(
                rows, codes, None, 0.25, False, "straight_through", "l2", "exact"
            )
            some = (torch.randn_like(quantized), torch.ones_like(loss), None, None)
            every = (torch.randn_like(quantized).transpose(0, 1).contiguous().transpose(0, 1), *[torch.ones_like(loss)] * 3)
            rest = (rows, quantized, indices, list(codes.shape), 0.25, False, "rotation")
            yield *some, *rest, True, True
            yield *every, *rest, True, False
            yield None, torch.ones_like(loss), None, None, *rest, False, True
    elif name.startswith("code_entropy"):
        yield from entropy_samples(name)
    elif name in CODEBOOK_SAMPLES:
        yield from CODEBOOK_SAMPLES[name]()
    elif name == "residual_quantize":
        yield from residual_samples()
    elif name == "residual_quantize_backward":
        for x, codebooks, sizes, *options in residual_samples():
            quantized, indices, loss, *_ = OPERATORS["residual_quantize"].reference(x, codebooks, sizes, *options)
            rest = (x.detach(), codebooks.detach(), indices, sizes, 0.25, "rotation")
            yield torch.randn_like(quantized), torch.ones_like(loss), *rest, True, True
            yield torch.randn_like(quantized), None, *rest, True, False
            yield None, torch.ones_like(loss), *rest, False, True
    else:
        raise AssertionError(f"{name} has no samples: add them")


def indexed():
    """x, indices and a codebook, without heads and with."""
    for lead in ((), (2,)):
        yield torch.randn(*lead, 5, 4), torch.randint(-1, 8, (*lead, 5)), torch.randn(*lead, 7, 4)


def trained(lead, dtype=torch.float32):
    return torch.randn(*lead, 7, 4).to(dtype), torch.rand(*lead, 7) * 4, torch.randn(*lead, 7, 4)


CODEBOOK_SAMPLES = {
    "gather_codes": lambda: ((c.clone().requires_grad_(), i) for _, i, c in indexed()),
    "gather_codes_backward": lambda: ((x, i, list(c.shape)) for x, i, c in indexed()),
    "code_statistics": lambda: (
        (x.clone().to(dtype).requires_grad_(), i, mask, 7, c.dim() == 3, wide)
        for x, i, c in indexed()
        for mask in (None, i > 2)
        for dtype, wide in ((torch.float32, torch.float32), (torch.bfloat16, torch.float64))
    ),
    "code_statistics_backward": lambda: ((c, x.bfloat16(), i, None) for x, i, c in indexed()),
    "update_codebook_ema_": lambda: (
        (*trained(lead, dtype), torch.randint(0, 5, (*lead, 7)), torch.randn(*lead, 7, 4), 0.9, 1e-5, True)
        for lead in ((), (2,))
        for dtype in (torch.float32, torch.float16)
    ),
    "replace_dead_codes_": lambda: (
        (*trained(lead), torch.randn(*lead, 5, 4), mask, torch.tensor([1, 2]), 2.0, 1.0, False)
        for lead in ((), (2,))
        for mask in (None, torch.rand(*lead, 5) > 0.3)
    ),
}


def residual_samples():
    """x, codebooks, sizes, levels, mask, depth and the rest of residual_quantize."""
    x, codebooks = torch.randn(2, 5, 4), torch.randn(3, 7, 4)
    permuted = torch.randn(2, 4, 5).transpose(1, 2)
    levels, mask = torch.tensor([1, 3]), torch.rand(2, 5) > 0.3
    for gradient, statistics in itertools.product(ops.GRADIENTS, (None, torch.float32, torch.float64)):
        rest = (0.25, gradient, "l2", "exact", statistics)
        yield x.clone().requires_grad_(), codebooks.clone().requires_grad_(), [], None, None, 3, *rest
        yield permuted.detach().requires_grad_(), codebooks.clone().requires_grad_(), [], levels, mask, 3, *rest
        yield x.half(), codebooks.flatten(0, 1).bfloat16().requires_grad_(), [4, 1, 16], None, mask, 2, *rest
        yield x[0, 0].clone().requires_grad_(), codebooks[0].expand(3, 7, 4), [], None, None, 0, *rest


def entropy_samples(name):
    x, codebook, heads = torch.randn(2, 5, 4), torch.randn(7, 4), torch.randn(2, 7, 4)
    permuted, mask = torch.randn(2, 4, 5).transpose(1, 2), torch.rand(2, 5) > 0.3
    cases = [
        (x, codebook, None, 1.0, "l2", 0.0),
        (permuted, codebook.t().contiguous().t(), mask, 0.5, "cosine", 1e-5),
        (x, heads, mask, 2.0, "dot", 0.0),
        (x.bfloat16(), codebook, None, 1.0, "l2", 0.0),
        (x.double(), codebook.half(), None, 1.0, "dot", 0.0),
        (x[:, :0], codebook, None, 1.0, "l2", 0.0),
        (x[0, 0], codebook, None, 1.0, "l2", 0.0),
    ]
    for given in cases:
        rows, codes, valid, temperature, metric, eps = given
        if name == "code_entropy":
            yield rows.clone().requires_grad_(), codes.clone().requires_grad_(), *given[2:]
            continue
        sample, mean, terms, probability = OPERATORS["code_entropy"].reference(*given)
        saved = (rows, codes, valid, terms, probability, temperature, metric, eps)
        yield torch.ones_like(sample), torch.ones_like(mean), *saved, True, True
        yield None, torch.ones_like(mean), *saved, True, False
        yield torch.ones_like(sample), None, *saved, False, True


@each_overload(dict.fromkeys(case.operator for case in battery.cases("vq")))
def test_opcheck(name, overload):
    for arguments in samples(name):
        torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize(
    "overload", list({str(o): o for o in OPERATORS["vector_quantize_backward"].overloads.values()}.values()), ids=str
)
def test_backward_takes_any_layout(overload):
    """Only a direct call brings transposed indices; they must not be read as if they were dense."""
    dense = (torch.randn(5, 2, 4), torch.randn(5, 2, 4), torch.randint(-1, 3, (5, 2)))
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in dense]
    results = []
    for x, quantized, indices in (dense, turned):
        given = (quantized.flip(0), torch.tensor(1.0), None, None, x, quantized, indices)
        results.append(overload(*given, [3, 4], 0.25, False, "rotation", True, True))
    assert_same(*results)


# -- torch.compile ----------------------------------------------------------------------------------------------------


def tensors(*leading, codes=9, dim=6, dtype=torch.float32):
    torch.manual_seed(len(leading) + sum(leading))
    return torch.randn(*leading, dim, dtype=dtype), torch.randn(codes, dim, dtype=dtype)


def outputs_and_gradients(function, x, codebook):
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    out = function(x, codebook)
    (out.loss + (out.quantized * torch.linspace(0, 1, x.shape[-1])).sum()).backward()
    return [*out, x.grad, codebook.grad]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
def test_compile_with_dynamic_shapes_and_a_change_of_rank(implementation, gradient):
    def function(x, codebook):
        return mk.vector_quantize(x, codebook, gradient=gradient)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows, codes in ((23, 9), (5, 9), (64, 17), (7, 3)):
        arguments = tensors(rows, codes=codes)
        assert_same(outputs_and_gradients(compiled, *arguments), outputs_and_gradients(function, *arguments))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1  # sizes are not specialised on
    for leading in ((3, 5), (2, 3, 4), (9,), ()):
        arguments = tensors(*leading)
        assert_same(outputs_and_gradients(compiled, *arguments), outputs_and_gradients(function, *arguments))


def test_compile_lookup_with_mask_and_heads(implementation):
    compiled = torch.compile(mk.nearest_code, fullgraph=True, dynamic=True, backend="aot_eager")
    for heads, rows in ((2, 5), (2, 9), (4, 3)):
        x, codebook, mask = torch.randn(heads, rows, 6), torch.randn(heads, 7, 6), torch.rand(heads, rows) > 0.3
        for metric in ops.METRICS:
            assert torch.equal(
                compiled(x, codebook, mask=mask, metric=metric), mk.nearest_code(x, codebook, mask=mask, metric=metric)
            )


def test_compile_with_sizes_of_zero_and_one(implementation):
    compiled = torch.compile(mk.vector_quantize, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, codes, dim in ((0, 5, 3), (1, 5, 3), (4, 1, 3), (4, 5, 1), (1, 1, 1)):
        arguments = tensors(rows, codes=codes, dim=dim)
        assert_same(outputs_and_gradients(compiled, *arguments), outputs_and_gradients(mk.vector_quantize, *arguments))


def test_compile_with_inductor(implementation):
    """What users run: neighbours fused around the operator, strides as Inductor likes them."""

    def function(images, codebook):
        x = (images * 2 + 1).permute(0, 2, 3, 1)
        out = mk.vector_quantize(x, codebook)
        return out._replace(quantized=out.quantized.permute(0, 3, 1, 2) * 3)

    images, codebook = torch.randn(2, 6, 4, 5), torch.randn(9, 6)
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        of_images, of_codes = images.clone().requires_grad_(), codebook.clone().requires_grad_()
        out = call(of_images, of_codes)
        (out.loss + out.quantized.square().sum()).backward()
        results.append([*out, of_images.grad, of_codes.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1])


def test_compiled_graph_shows_what_it_runs(implementation):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(mk.nearest_code, backend=keep, fullgraph=True)(*tensors(4))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets == ["mmgen_kernels.nearest_code." + ("reference" if implementation == "reference" else "default")]


def test_other_beta_in_compiled_code(implementation):
    compiled = torch.compile(lambda x, c, beta: mk.vector_quantize(x, c, beta=beta).loss, fullgraph=True, backend="aot_eager")
    x, codebook = tensors(12)
    for beta in (0.25, 0.5, 1, 3.0):
        assert torch.equal(compiled(x, codebook, beta), mk.vector_quantize(x, codebook, beta=beta).loss)


def test_compiled_module_with_codebook_written_in_place(implementation):
    """The EMA pattern inside one compiled step."""

    def step(x, codebook):
        out = mk.vector_quantize(x, codebook.detach())
        codebook.mul_(0.9)
        return out.loss, out.indices

    x, codebook = tensors(12)
    x.requires_grad_()
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        codes, rows = codebook.clone(), x.detach().requires_grad_()
        loss, indices = call(rows, codes)
        loss.backward()
        results.append((loss, indices, rows.grad, codes))
    assert_same(*results)


# -- torch.export -----------------------------------------------------------------------------------------------------


class Quantizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.codebook = torch.nn.Parameter(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        out = mk.vector_quantize(x, self.codebook, gradient="rotation")
        return out.quantized, out.indices, out.loss, mk.nearest_code(x, self.codebook, metric="cosine")


def exported(module):
    rows = torch.export.Dim("rows", min=2, max=4096)
    return torch.export.export(module, (torch.randn(8, 6),), dynamic_shapes=({0: rows},))


def test_export_saved_and_loaded(implementation):
    module = Quantizer()
    file = io.BytesIO()
    torch.export.save(exported(module), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (8, 3, 100):
        x = torch.randn(rows, 6)
        assert_same(loaded(x), module(x))


def test_export_loaded_by_another_process(tmp_path):
    module, x = Quantizer(), torch.randn(5, 6)
    torch.export.save(exported(module), tmp_path / "program.pt2")
    torch.save((x, [t.detach() for t in module(x)]), tmp_path / "expected.pt")
    code = (
        "import torch, mmgen_kernels; x, expected = torch.load('expected.pt');"
        "got = torch.export.load('program.pt2').module()(x);"
        "assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)); print('same')"
    )
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # a checkout that is not installed is found too
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=here)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.long
def test_ahead_of_time_inductor(tmp_path):
    module = Quantizer()
    path = torch._inductor.aoti_compile_and_package(exported(module), package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for rows in (8, 3, 100):
            x = torch.randn(rows, 6)
            assert_same(loaded(x), module(x))


# -- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("compiled", (False, True))
def test_autocast_changes_nothing(implementation, dtype, compiled):
    arguments = tensors(33, codes=57)
    expected = outputs_and_gradients(mk.vector_quantize, *arguments)
    function = torch.compile(mk.vector_quantize, fullgraph=True, backend="aot_eager") if compiled else mk.vector_quantize
    lookup = torch.compile(mk.nearest_code, fullgraph=True, backend="aot_eager") if compiled else mk.nearest_code
    with torch.autocast("cpu", dtype):
        assert_same(outputs_and_gradients(function, *arguments), expected)
        assert torch.equal(lookup(*arguments, metric="dot"), mk.nearest_code(*(a.clone() for a in arguments), metric="dot"))
    with torch.autocast("cpu", dtype):
        x, codebook = (a.detach().requires_grad_() for a in arguments)
        out = function(x, codebook)
    (out.loss + (out.quantized * torch.linspace(0, 1, 6)).sum()).backward()
    assert_same([*out, x.grad, codebook.grad], expected)


# -- double backward --------------------------------------------------------------------------------------------------

REFUSED = "vector_quantize_backward has no derivative; the operator is differentiable once"


@pytest.mark.parametrize("output", ("quantized", "loss", "commitment_loss", "codebook_loss"))
def test_double_backward_is_refused(implementation, output):
    x, codebook = (t.requires_grad_() for t in tensors(5))
    value = getattr(mk.vector_quantize(x, codebook, gradient="rotation"), output).sum()
    grads = torch.autograd.grad(value, (x, codebook), create_graph=True, allow_unused=True)
    grad = next(g for g in grads if g is not None and g.requires_grad)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(grad.sum(), (x, codebook), allow_unused=True)


def test_double_backward_is_refused_in_a_direct_call():
    for overload in (torch.ops.mmgen_kernels.vector_quantize, torch.ops.mmgen_kernels.vector_quantize.reference):
        x, codebook = (t.requires_grad_() for t in tensors(5))
        loss = overload(x, codebook, None, 0.25, False, "straight_through", "l2", "exact")[2]
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            grad.sum().backward()


def test_double_backward_is_refused_in_compiled_code(implementation):
    compiled = torch.compile(lambda x, c: mk.vector_quantize(x, c).loss, fullgraph=True, backend="aot_eager")
    x, codebook = (t.requires_grad_() for t in tensors(5))
    (grad,) = torch.autograd.grad(compiled(x, codebook), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_create_graph_alone_is_allowed(implementation):
    """Gradient penalties on other parts of a model run the backward with create_graph=True."""
    x, codebook = (t.requires_grad_() for t in tensors(5))
    weight = torch.randn(5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(mk.vector_quantize(x, codebook).loss, x, create_graph=True)
    (grad.detach() * weight).sum().backward()
    assert torch.equal(weight.grad, grad.detach())
