"""What trains a codebook by Triton: the battery's cases under the interpreter, and dead codes compiled ahead of time."""

import importlib.util

import pytest
import torch
from test_triton import SHARED, compiled
from triton_interpreter import Interpreter

import mmgen_kernels as mk
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.vq import codebook

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


# The interpreter takes a second for what others do in a millisecond: of the rest only these, and all in the long tests.
SHORT = ("plain", "one_code", "no_rows")


def cases():
    for case in codebook.CASES:
        marks = () if case.name in SHORT or case.operator == "replace_dead_codes_" else pytest.mark.long
        yield pytest.param(case, marks=marks, id=f"{case.operator}-{case.name}")


@pytest.mark.parametrize("case", list(cases()))
def test_case(interpreter, case):
    for dtypes, (failures, repeatable) in zip(case.dtypes, interpreter.judge(case.operator, case.name), strict=True):
        assert not failures and repeatable, (dtypes, failures)


@pytest.mark.parametrize("threshold", (float("inf"), -float("inf"), float("nan"), 1e300))
def test_thresholds_that_fp32_does_not_hold(interpreter, threshold):
    given = codebook.dying((), (9,), 5, 3)(torch.float64)
    rest = (given["x"], None, given["key"], threshold, 2.0, False)
    found, expected = ([given[name].clone() for name in codebook.TRAINED] for _ in range(2))
    found = interpreter.replace_dead_codes_(found, rest)
    torch.ops.mmgen_kernels.replace_dead_codes_.reference(*expected, *rest)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("masked", (False, True))
def test_dead_codes_on_gpu(masked):
    """The reference's rows, and in a graph: a look at a value on the host would be an error of the capture."""
    given = codebook.dying((3,), (3, 5000), 4000, 24, masked=masked, normalize=True)(torch.float32)
    expected = [given[name].clone() for name in codebook.TRAINED]
    options = {"threshold": given["threshold"], "mask": given["mask"], "normalize": True}
    with mk.use_backend("reference"):
        mk.replace_dead_codes_(*expected, given["x"], given["key"], **options)
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    options["mask"] = there["mask"]
    with mk.use_backend("triton"):
        direct = [there[name].clone() for name in codebook.TRAINED]
        mk.replace_dead_codes_(*direct, there["x"], there["key"], **options)
        graph, captured = torch.cuda.CUDAGraph(), [there[name].clone() for name in codebook.TRAINED]
        with torch.cuda.graph(graph):
            mk.replace_dead_codes_(*captured, there["x"], there["key"], **options)
    graph.replay()
    for found in (direct, captured):
        assert torch.equal(found[1].cpu(), expected[1])
        for a, b in zip(found, expected, strict=True):  # norms are added in another order
            torch.testing.assert_close(a.cpu(), b, rtol=2e-7, atol=0)


# -- ahead of time: the kernels of dead codes, those of sums are in test_triton.py -------------------------------------

DEAD = ("draw_and_count", "replace_dead")


def assert_good_code(requests):
    for request, code in compiled(requests).items():
        where = f"{request}: {code}"
        assert code["stack"] == 0 and code["spills"] == 0, where
        assert code["shared"] <= SHARED[request[1]], where
        assert code["fused"] == 0 and not code["block_pointers"], where


def test_compiles_without_spills():
    assert_good_code([[kernel, 90, 128, "cosine"] for kernel in DEAD])


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_compiles_without_spills(capability):
    """A mask where the metric is l2, and rows divided by their norms where it is cosine."""
    assert_good_code([[kernel, capability, dim, m] for kernel in DEAD for dim in (8, 128) for m in ("l2", "cosine", "dot")])
