"""What trains a codebook by Triton: the battery's cases under the interpreter."""

import importlib.util

import pytest
from triton_interpreter import Interpreter

from mmgen_kernels.battery.vq import codebook

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


# The interpreter takes a second for what others do in a millisecond: of the rest only these, and all in the long tests.
SHORT = ("plain", "one_code", "no_rows", "more_dead_than_rows")


def cases():
    for case in codebook.CASES:
        marks = () if case.name in SHORT else pytest.mark.long
        yield pytest.param(case, marks=marks, id=f"{case.operator}-{case.name}")


@pytest.mark.parametrize("case", list(cases()))
def test_case(interpreter, case):
    for dtypes, (failures, repeatable) in zip(case.dtypes, interpreter.judge(case.operator, case.name), strict=True):
        assert not failures and repeatable, (dtypes, failures)
