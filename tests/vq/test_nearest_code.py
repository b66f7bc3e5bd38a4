"""nearest_code beyond the battery: the definition itself, extremes of fp64, random shapes, what the docstring promises."""

import math
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.battery.vq.data import DATA_SETS, add_ulps
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.vq import ops, reference


def instruction_sets():
    """Those that this CPU runs, as far as the probe was built to tell."""
    try:
        from mmgen_kernels import _probe
    except ImportError:
        return ["scalar_bf16", "scalar_int16"]
    return _probe.instruction_sets()


IMPLEMENTATIONS = battery.implementations("nearest_code", torch.device("cpu"))
# The C++ path once more with a coarse first pass, which small codebooks do not get by themselves.
COARSE = [
    name
    for name in ("scalar_bf16", "scalar_int16", "avx512_vnni", "avx512_bf16", "amx")
    if "cpp" in IMPLEMENTATIONS and name in instruction_sets()
]


@contextmanager
def using(implementation):
    """use_backend, or the C++ path by that instruction set."""
    if implementation not in COARSE:
        with mk.use_backend(implementation):
            yield
        return
    with pytest.MonkeyPatch.context() as patch, mk.use_backend("cpp"):
        patch.setenv("MMGEN_KERNELS_CPU", implementation)
        yield


@pytest.fixture(params=[*IMPLEMENTATIONS, *COARSE])
def implementation(request):
    with using(request.param):
        yield request.param


def by_hand(x, codebook, metric):
    """The contract in scalar Python, whose floats are fp64 and whose products and sums round apart."""
    found = []
    for row in x.double().tolist():
        best, index = math.inf, 0
        for k, code in enumerate(codebook.double().tolist()):
            total = squared = 0.0
            for a, b in zip(row, code, strict=True):
                total += (a - b) * (a - b) if metric == "l2" else a * b
                squared += b * b
            if metric == "cosine":
                norm = math.sqrt(squared)
                total = 0.0 if norm == 0 else total / norm
            value = total if metric == "l2" else -total
            if value < best:
                best, index = value, k
        found.append(index)
    return torch.tensor(found)


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_the_definition(implementation, data, metric):
    x, codebook = DATA_SETS[data](19, 53, 9, torch.float32, torch.float32)
    assert torch.equal(mk.nearest_code(x, codebook, metric=metric), by_hand(x, codebook, metric))


def test_definition_of_cosine_does_not_depend_on_a_vector_maths_library():
    """torch's fp64 sqrt on the CPU was one ulp off here, and turned a tie into a wrong winner."""
    squared = 16.475788875002653 + torch.arange(4096, dtype=torch.float64) * 2.0**-48
    assert reference.lookup.square_roots(squared).tolist() == [math.sqrt(v) for v in squared.tolist()]
    x, codebook = DATA_SETS["near_ties"](65, 97, 16, torch.float32, torch.float32)
    assert torch.equal(reference.nearest_code(x, codebook, None, "cosine", "exact"), by_hand(x, codebook, "cosine"))


def test_ties_take_the_lowest_index(implementation):
    codebook = torch.tensor([[9.0, 9], [1, 0], [-1, 0], [1, 0], [0, 1]])
    assert mk.nearest_code(torch.zeros(1, 2), codebook).tolist() == [1]
    assert mk.nearest_code(torch.tensor([[1.0, 0], [0, 1], [-2, 0]]), codebook).tolist() == [1, 4, 2]


def test_masked_rows_give_minus_one(implementation):
    x = torch.tensor([[0.0], [5.0], [torch.nan]])
    mask = torch.tensor([True, False, False])
    assert mk.nearest_code(x, torch.tensor([[4.0], [0.0]]), mask=mask).tolist() == [1, -1, -1]


@pytest.mark.parametrize("metric", ops.METRICS)
def test_rows_and_codes_that_are_not_finite(implementation, metric):
    """NaN never wins. Under l2 nothing is near an infinite row; under dot an infinite product wins."""
    nan, inf = torch.nan, torch.inf
    codebook = torch.tensor([[nan, 1.0], [2.0, 2.0], [1.0, 1.0]])
    x = torch.tensor([[nan, 0.0], [1.0, 1.0], [inf, 0.0]])
    assert mk.nearest_code(x, codebook, metric=metric).tolist() == {"l2": [0, 2, 0], "dot": [0, 1, 1], "cosine": [0, 1, 1]}[metric]
    codebook = torch.tensor([[1.0, 1.0], [inf, 1.0], [-inf, 1.0]])
    x = torch.tensor([[3.0, 3.0]])
    # cosine: inf / inf is NaN
    assert mk.nearest_code(x, codebook, metric=metric).tolist() == {"l2": [0], "dot": [1], "cosine": [0]}[metric]


@pytest.mark.parametrize("metric", ("dot", "cosine"))
@pytest.mark.parametrize("broken", (torch.nan, torch.inf))
def test_a_zero_row_beside_codes_that_are_not_finite(implementation, metric, broken):
    """0 x NaN and 0 x Inf are NaN, which never wins; all other codes score 0."""
    codebook = torch.tensor([[broken, 1.0], [1.0, 1.0], [2.0, 1.0]])
    assert mk.nearest_code(torch.zeros(2, 2), codebook, metric=metric).tolist() == [1, 1]


EXTREMES = (5e-324, 1e-310, 1e-200, 1e-160, 1e-100, 1.0, 1e100, 1e150, 1e160, 1e300, 1.7e308)


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("of_x", EXTREMES)
@pytest.mark.parametrize("of_codes", EXTREMES)
def test_extremes_of_fp64(of_x, of_codes, metric):
    """Where squares overflow or vanish, the definition still has a winner: the lowest index of the least value."""
    x = randn(7, 3, seed=1).clamp(-1, 1) * of_x
    codebook = randn(9, 3, seed=2).clamp(-1, 1) * of_codes
    codebook[4] = randn(3, seed=3)
    x[5] = randn(3, seed=4)
    truth = by_hand(x, codebook, metric)
    for implementation in (*IMPLEMENTATIONS, *COARSE):
        with using(implementation):
            assert torch.equal(mk.nearest_code(x, codebook, metric=metric), truth), implementation


def test_a_code_whose_norm_overflows_is_no_zero_code(implementation):
    """cosine: inf / inf is NaN and never wins, while a zero code scores 0 and may."""
    x = torch.tensor([[1e200, 0.0]], dtype=torch.float64)
    codebook = torch.tensor([[1e300, 0.0], [-1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert mk.nearest_code(x, codebook, metric="cosine").tolist() == [2]
    assert mk.nearest_code(x, codebook[:2], metric="cosine").tolist() == [1]
    assert mk.nearest_code(x, codebook[[0, 3]], metric="cosine").tolist() == [1]


@pytest.mark.parametrize("data", ("vanishing", "mixed_rows", "mixed_codes"))
@pytest.mark.parametrize("dim", (1, 2, 3, 12))
@pytest.mark.parametrize("broken", (None, torch.nan, torch.inf))
def test_codes_that_vanish_beside_the_rows(implementation, data, dim, broken):
    """Codes that vanish in every dimension tie exactly and the first wins, unless it is not finite; those that vanish in all
    but one do not tie."""
    x, codebook = DATA_SETS[data](300, 60, dim, torch.float64, torch.float64)
    if broken is not None:
        codebook[0] = broken
    truth = by_hand(x, codebook, "l2")
    assert len(truth.unique()) > 1
    assert torch.equal(mk.nearest_code(x, codebook), truth)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf))
def test_first_of_many_ties_is_not_finite(implementation, broken):
    """Far away all codes tie and the first is the answer, but not one at no finite distance."""
    codebook = torch.tensor([[broken], [1.0], [-2.0]], dtype=torch.float64)
    x = 2.0 ** torch.arange(40, 80, dtype=torch.float64)[:, None]
    assert torch.equal(mk.nearest_code(x, codebook), by_hand(x, codebook, "l2"))
    assert mk.nearest_code(x[-1:], codebook).tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_every_pair_of_dtypes(implementation, dtype, other):
    x, codebook = DATA_SETS["gaussian"](29, 31, 6, dtype, other)
    assert torch.equal(mk.nearest_code(x, codebook), by_hand(x, codebook, "l2"))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("metric", ops.METRICS)
def test_subnormals(implementation, dtype, metric):
    tiny = torch.finfo(dtype).smallest_normal
    x, codebook = ((randn(n, 5, seed=n) * tiny / 8).to(dtype) for n in (23, 41))
    assert (codebook.abs() < tiny).all() and codebook.count_nonzero() > 100
    assert torch.equal(mk.nearest_code(x, codebook, metric=metric), by_hand(x, codebook, metric))


@pytest.mark.parametrize("scale", (1e-30, 1e-3, 1.0, 1e3, 1e15))
@pytest.mark.parametrize("offset", (0.0, 1.0, 1e2, 1e6))
@pytest.mark.parametrize("metric", ops.METRICS)
def test_gaps_of_one_ulp(scale, offset, metric):
    """The empirical side of the error bound: if it were too small anywhere, codes one ulp apart would show it."""
    base = (randn(16, seed=2) + offset).float() * scale
    codebook = add_ulps(base.expand(200, 16).contiguous(), randint(-1, 2, (200, 16), seed=3))
    x = torch.cat([
        add_ulps(base.expand(40, 16).contiguous(), randint(-2, 3, (40, 16), seed=4)),
        (randn(40, 16, seed=5) + offset).float() * scale,
        randn(20, 16, seed=6).float() * scale * 10 ** randn(20, 1, seed=7).float(),
    ])  # fmt: skip
    truth = reference.nearest_code(x, codebook, None, metric, "exact")
    assert len(truth.unique()) > 5
    for implementation in (*IMPLEMENTATIONS, *COARSE):
        with using(implementation):
            assert torch.equal(mk.nearest_code(x, codebook, metric=metric), truth), implementation


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(0, 7), max_size=3),
    heads=st.integers(0, 3),
    codes=st.integers(1, 90),
    dim=st.integers(1, 40),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    metric=st.sampled_from(ops.METRICS),
    layout=st.sampled_from(("contiguous", "channels_first", "strided", "expanded")),
    masked=st.booleans(),
    grid=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shapes(leading, heads, codes, dim, dtypes, metric, layout, masked, grid, seed):
    shape = ([heads] if heads else []) + leading
    x, codebook = randn(*shape, dim, seed=seed), randn(*([heads] if heads else []), codes, dim, seed=seed + 1)
    if grid:  # many exact ties
        x, codebook = x.round(), codebook.round()
    x, codebook = x.to(dtypes[0]), codebook.to(dtypes[1])
    if layout == "channels_first" and x.dim() > 1:
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
        codebook = codebook.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "strided":
        x, codebook = (torch.stack([v, v + 1], -1)[..., 0] for v in (x, codebook))
    elif layout == "expanded" and x.numel():
        x = x[..., :1].expand(x.shape)
    mask = randn(*shape, seed=seed + 2) > 0 if masked else None
    truth = reference.nearest_code(x.contiguous(), codebook.contiguous(), mask, metric, "exact")
    for implementation in (*IMPLEMENTATIONS, *COARSE):
        with using(implementation):
            indices = mk.nearest_code(x, codebook, metric=metric, mask=mask)
        assert indices.shape == x.shape[:-1] and torch.equal(indices, truth), implementation


@pytest.mark.long
@settings(max_examples=1500, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 80), st.integers(1, 300), st.integers(1, 100)),
    data=st.sampled_from(list(DATA_SETS)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    metric=st.sampled_from(ops.METRICS),
    scale=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
)
def test_hard_data_of_every_size(sizes, data, dtypes, metric, scale):
    x, codebook = DATA_SETS[data](*sizes, *dtypes)
    x, codebook = x * 2.0 ** scale[0], codebook * 2.0 ** scale[1]
    truth = reference.nearest_code(x, codebook, None, metric, "exact")
    for implementation in IMPLEMENTATIONS[:-1]:
        with mk.use_backend(implementation):
            assert torch.equal(mk.nearest_code(x, codebook, metric=metric), truth), implementation


MEMORY = """
import resource, torch, mmgen_kernels as mk
torch.set_num_threads(1)
with mk.use_backend({implementation!r}):
    mk.nearest_code(torch.randn(64, 2), torch.randn(64, 2))
    x, codebook = torch.randn(12000, 2), torch.randn(12000, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mk.nearest_code(x, codebook)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_no_matrix_of_rows_and_codes_is_held(implementation):
    """12000 x 12000 scores would be 550 MiB in fp32 and twice that in fp64."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = MEMORY.format(implementation=implementation)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert float(done.stdout) < 160, done.stderr  # MiB


def test_inputs_are_not_written(implementation):
    x, codebook, mask = randn(40, 6, seed=1), randn(11, 6, seed=2), randn(40, seed=3) > 0
    before = [(v.clone(), v._version) for v in (x, codebook, mask)]
    for metric in ops.METRICS:
        mk.nearest_code(x, codebook, metric=metric, mask=mask)
    for value, (copy, version) in zip((x, codebook, mask), before, strict=True):
        assert torch.equal(value, copy) and value._version == version


def test_not_differentiable(implementation):
    x, codebook = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        indices = mk.nearest_code(x, codebook)
        direct = torch.ops.mmgen_kernels.nearest_code(x, codebook, None, "l2", "exact")
    assert not indices.requires_grad and not direct.requires_grad


def test_views_with_a_storage_offset_are_read_in_place(implementation):
    buffer = torch.full((7, 100), torch.nan)
    buffer[2:6, 31:43] = torch.randn(4, 12)
    codebook = torch.full((50, 40), torch.nan)
    codebook[10:41:3, 5:17] = torch.randn(11, 12)
    x, codes = buffer[2:6, 31:43], codebook[10:41:3, 5:17]
    assert torch.equal(mk.nearest_code(x, codes), by_hand(x, codes, "l2"))
