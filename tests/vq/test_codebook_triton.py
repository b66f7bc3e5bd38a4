"""What trains a codebook by Triton: the battery's cases under the interpreter, and dead codes compiled ahead of time."""

import importlib.util

import pytest
from test_triton import SHARED, compiled
from triton_interpreter import Interpreter

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
