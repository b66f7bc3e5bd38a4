"""Which implementation runs: scopes, reasons, environment, the warning of a fallback."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.library import OPERATORS

X, CODEBOOK = torch.zeros(5, 4), torch.zeros(3, 4)
LOOKUP = OPERATORS["nearest_code"]
needs_cpp = pytest.mark.skipif(not LOOKUP.has_cpp, reason=f"needs the C++ part, which is {backends.library_error()}")


@pytest.fixture
def ran(monkeypatch):
    """The implementations by which nearest_code ran, in order."""
    names = []
    call = type(LOOKUP).__call__

    def record(self, implementation, *args):
        names.append(implementation)
        return call(self, implementation, *args)

    monkeypatch.setattr(type(LOOKUP), "__call__", record)
    return names


@pytest.fixture
def without_cpp(monkeypatch):
    """As if the C++ part had not been built."""
    monkeypatch.setattr(backends, "_library_error", "not built: no compiler")
    monkeypatch.setattr(backends, "_warned", set())
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "has_cpp", False)


def run(code, **environment):
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MMGEN_KERNELS_")} | paths | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


@needs_cpp
def test_scopes_nest_and_end(ran):
    mk.nearest_code(X, CODEBOOK)
    with mk.use_backend("reference"):
        mk.nearest_code(X, CODEBOOK)
        with mk.use_backend("cpp"):
            mk.nearest_code(X, CODEBOOK)
        mk.nearest_code(X, CODEBOOK)
    mk.nearest_code(X, CODEBOOK)
    assert ran == ["cpp", "reference", "cpp", "reference", "cpp"]
    assert backends._forced == {}


@needs_cpp
def test_a_scope_ends_on_an_error(ran):
    with pytest.raises(ZeroDivisionError), mk.use_backend("reference"):
        raise ZeroDivisionError
    mk.nearest_code(X, CODEBOOK)
    assert ran == ["cpp"]


@needs_cpp
def test_a_family_outranks_all_families(ran):
    with mk.use_backend("cpp"), mk.use_backend("reference", family="vq"):
        mk.nearest_code(X, CODEBOOK)
    with mk.use_backend("reference", family="vq"), mk.use_backend("cpp"):
        mk.nearest_code(X, CODEBOOK)
    assert ran == ["reference", "reference"]


def test_names_that_do_not_exist():
    with (
        pytest.raises(ValueError, match="implementation must be one of cuda, triton, torch, cpp, reference, got 'numpy'"),
        mk.use_backend("numpy"),
    ):
        pass
    with pytest.raises(ValueError, match=r"family must be one of vq.* or None, got 'audio'"), mk.use_backend("cpp", family="audio"):
        pass


@pytest.mark.parametrize("implementation", ("cuda", "triton", "torch"))
@pytest.mark.parametrize("compiled", (False, True))
def test_one_asked_for_by_name_that_cannot_serve_raises_with_reasons(implementation, compiled):
    function = torch.compile(mk.nearest_code, backend="aot_eager") if compiled else mk.nearest_code
    with mk.use_backend(implementation), pytest.raises(RuntimeError) as raised:
        function(X, CODEBOOK)
    message = str(raised.value)
    assert f"use_backend('{implementation}') cannot serve nearest_code:" in message
    for other in backends.IMPLEMENTATIONS:  # and what could
        assert f"  {other:<10} " in message
    assert "reference  available" in message


def test_cpp_asked_for_and_not_built(without_cpp):
    with mk.use_backend("cpp"), pytest.raises(RuntimeError, match="cannot serve nearest_code: not built: no compiler"):
        mk.nearest_code(X, CODEBOOK)


def test_fallback_warns_once_per_operator_and_reason(without_cpp, ran, monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            mk.nearest_code(X, CODEBOOK)
        mk.vector_quantize(X, CODEBOOK)
        mk.vector_quantize(X, CODEBOOK)
    texts = [str(w.message) for w in caught]
    assert texts == [
        "mmgen_kernels.nearest_code runs as plain PyTorch on cpu: cpp: not built: no compiler",
        "mmgen_kernels.vector_quantize runs as plain PyTorch on cpu: cpp: not built: no compiler",
    ]
    assert all(w.filename == __file__ for w in caught)  # it points at the line that called, not into this package
    assert set(ran) == {"reference"}
    monkeypatch.setattr(backends, "_library_error", "another reason")
    with pytest.warns(UserWarning, match="another reason"):
        mk.nearest_code(X, CODEBOOK)


def test_compiled_code_falls_back_without_a_word(without_cpp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(mk.nearest_code, fullgraph=True, backend="aot_eager")
        assert compiled(X, CODEBOOK).tolist() == [0] * 5


def test_asking_for_the_reference_does_not_warn(without_cpp):
    with warnings.catch_warnings(), mk.use_backend("reference"):
        warnings.simplefilter("error")
        mk.nearest_code(X, CODEBOOK)


@needs_cpp
def test_compiled_code_follows_the_scope():
    """Dynamo guards the choice: the same compiled function changes implementation with the scope around it."""
    targets = []

    def keep(graph, _):
        targets.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    compiled = torch.compile(mk.nearest_code, fullgraph=True, backend=keep)
    compiled(X, CODEBOOK)
    with mk.use_backend("reference"):
        compiled(X, CODEBOOK)
        compiled(X, CODEBOOK)
    compiled(X, CODEBOOK)
    assert targets == [["mmgen_kernels.nearest_code.default"], ["mmgen_kernels.nearest_code.reference"]]


@needs_cpp
def test_scope_inside_compiled_code():
    targets = []

    def keep(graph, _):
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    def function(x, codebook):
        with mk.use_backend("reference"):
            a = mk.nearest_code(x, codebook)
        return a + mk.nearest_code(x, codebook)

    torch.compile(function, fullgraph=True, backend=keep)(X, CODEBOOK)
    assert [t for t in targets if "mmgen" in t] == ["mmgen_kernels.nearest_code.reference", "mmgen_kernels.nearest_code.default"]
    assert backends._forced == {}


@needs_cpp
def test_the_backward_runs_by_the_implementation_of_the_forward():
    """Left scopes do not change what a graph already chose."""
    seen = []
    backward = OPERATORS["vector_quantize_backward"].overloads
    before = dict(backward)
    for name in ("reference", "cpp"):
        backward[name] = lambda *a, name=name: seen.append(name) or before[name](*a)
    try:
        for name in ("reference", "cpp"):
            with mk.use_backend(name):
                loss = mk.vector_quantize(X.clone().requires_grad_(), CODEBOOK).loss
            loss.backward()
    finally:
        backward.update(before)
    assert seen == ["reference", "cpp"]


def test_report():
    report = mk.backend_report()
    for operator in ("nearest_code", "vector_quantize"):
        assert f"{operator} on cpu:" in report
    assert "backward" not in report
    for implementation in backends.IMPLEMENTATIONS:
        assert f"\n  {implementation:<10} " in report


@needs_cpp
@pytest.mark.parametrize("device", ("meta", "cpu", "cuda", "mps"))
def test_reasons(device):
    assert backends.reasons_against(LOOKUP, "reference", device) == []
    assert bool(backends.reasons_against(LOOKUP, "cpp", device)) == (device != "cpu")
    for implementation in ("cuda", "triton"):
        reasons = backends.reasons_against(LOOKUP, implementation, device)
        assert any(f"not on {device}" in r for r in reasons) == (device != "cuda")


# -- from outside -----------------------------------------------------------------------------------------------------

REPORT = """
import torch, mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.library import OPERATORS
print(backends.choose(OPERATORS["nearest_code"], "vq", "cpu"))
with mk.use_backend("cpp"):
    print(backends.choose(OPERATORS["nearest_code"], "vq", "cpu"))
print(mk.nearest_code(torch.ones(1, 2), torch.ones(3, 2)).tolist())
"""


@needs_cpp
@pytest.mark.parametrize("name", ("reference", "cpp"))
def test_environment(name):
    done = run(REPORT, MMGEN_KERNELS_BACKEND=name)
    assert done.stdout.split() == [name, "cpp", "[0]"], done.stderr


@needs_cpp
def test_environment_empty_is_unset():
    assert run(REPORT, MMGEN_KERNELS_BACKEND="").stdout.split()[0] == "cpp"


def test_environment_with_a_name_that_does_not_exist():
    done = run("import mmgen_kernels", MMGEN_KERNELS_BACKEND="numpy")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ValueError: MMGEN_KERNELS_BACKEND must be one of cuda, triton, torch, cpp, reference, got 'numpy'"


def test_environment_with_one_that_cannot_serve():
    done = run(
        "import torch, mmgen_kernels as mk; mk.nearest_code(torch.ones(1, 2), torch.ones(3, 2))", MMGEN_KERNELS_BACKEND="cuda"
    )
    assert done.returncode == 1 and "cannot serve nearest_code: runs on cuda tensors, not on cpu" in done.stderr


def test_a_library_that_does_not_load(tmp_path):
    """Built for another torch: import must succeed, say so, and fall back."""
    code = (
        "import mmgen_kernels.backends as b, pathlib, warnings, torch\n"
        "b.__file__ = str(pathlib.Path('.').resolve() / 'backends.py')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    b.load_library()\n"
        "print(caught[0].message)\n"
    )
    (tmp_path / "_C.abi3.so").write_text("not a library")
    (tmp_path / "_build.json").write_text('{"built": true, "torch": "2.7.0"}')
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert f"built for torch 2.7.0, you have {torch.__version__}" in done.stdout, done.stderr


# -- stepping aside ---------------------------------------------------------------------------------------------------


def graphs_of(function, *args):
    """The result of a compiled call, and what Dynamo captured: the functions called."""
    found = []

    def backend(module, inputs):
        found.extend(str(node.target) for node in module.graph.nodes)
        return module

    return torch.compile(function, backend=backend, fullgraph=True)(*args), " ".join(found)


def test_compiled_code_sees_the_reference_of_an_operator_that_steps_aside(monkeypatch):
    x, shift, scale = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 8), torch.randn(3, 8)
    expected, graph = graphs_of(mk.adaln, x, shift, scale)
    assert "mmgen_kernels.adaln" in graph
    monkeypatch.setitem(backends.STEPS_ASIDE, ("adaln", "cpu"), "a figure")
    torch._dynamo.reset()
    seen, graph = graphs_of(mk.adaln, x, shift, scale)
    assert "mmgen_kernels" not in graph
    torch.testing.assert_close(seen, expected)
    (of_seen,), (of_expected,) = (torch.autograd.grad(out.square().sum(), x) for out in (seen, expected))
    torch.testing.assert_close(of_seen, of_expected)
    assert "left to itself: a figure" in mk.backend_report()


def test_who_asks_by_name_is_not_stepped_aside_from(monkeypatch):
    monkeypatch.setitem(backends.STEPS_ASIDE, ("adaln", "cpu"), "a figure")
    x, shift, scale = torch.randn(3, 5, 8), torch.randn(3, 8), torch.randn(3, 8)
    with mk.use_backend("cpp"):
        assert "mmgen_kernels.adaln" in graphs_of(mk.adaln, x, shift, scale)[1]
    assert mk.adaln(x, shift, scale).shape == x.shape  # nor is eager code
