"""The battery, case by case: what `mmgen-kernels check` runs on the user's device."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.philox import streams
from mmgen_kernels.library import OPERATORS

CPU = torch.device("cpu")


def parameters():
    for case in battery.cases("philox"):
        for implementation in battery.implementations(case.operator, CPU):
            yield pytest.param(case, implementation, id=f"{case.operator}-{case.name}-{implementation}")


@pytest.mark.unpoisoned  # deterministic algorithms would hide an operator that is not repeatable
@pytest.mark.parametrize(("case", "implementation"), list(parameters()))
def test_case(case, implementation):
    for dtypes in case.dtypes:
        judge = case.prepare(CPU, dtypes)
        with mk.use_backend(implementation):
            outcome = judge()
        assert not outcome.failures, (dtypes, *outcome.failures)
        assert outcome.repeatable


def one_ulp_too_many(key, shape, dtype):
    noise = OPERATORS["philox_normal"].reference(key, shape, torch.float64)
    return (noise * (1 + 7 * 2.0**-23)).to(dtype)


def wrong_in_the_last_place(key, shape):
    integers = OPERATORS["philox_integers"].reference(key, shape)
    integers.view(-1)[-1:] ^= 1
    return integers


def depends_on_the_shape(key, shape):
    return OPERATORS["philox_integers"].reference(key, shape).sort(-1).values


@pytest.mark.parametrize(
    ("operator", "wrong", "caught"),
    [
        ("philox_normal", one_ulp_too_many, "normals are too far from fp64"),
        ("philox_integers", wrong_in_the_last_place, "1 of 1029 numbers differ"),
        ("philox_integers", depends_on_the_shape, "numbers differ when 514 are drawn"),
    ],
)
def test_the_battery_notices_a_wrong_kernel(monkeypatch, operator, wrong, caught):
    monkeypatch.setitem(OPERATORS[operator].overloads, "reference", wrong)
    dtype = torch.int64 if operator == "philox_integers" else torch.float32
    judge = streams.drawn(operator, (), (1029,))(CPU, (dtype,))
    with mk.use_backend("reference"):
        assert any(caught in failure for failure in judge().failures)
