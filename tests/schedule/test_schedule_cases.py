"""The battery, case by case, what every instruction set must pass of it, and that it notices what is wrong."""

import battery_cases
import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery.schedule import scheduler_step
from mmgen_kernels.battery.schedule.law import FP32, prepared
from mmgen_kernels.library import OPERATORS


@pytest.mark.unpoisoned  # deterministic algorithms would hide an operator that is not repeatable
@pytest.mark.parametrize(("case", "dtypes", "implementation"), list(battery_cases.parameters("schedule")))
def test_case(case, dtypes, implementation):
    battery_cases.check(case, dtypes, implementation)


@pytest.mark.skipif(not OPERATORS["scheduler_step"].has_cpp, reason="the C++ part is not built")
@pytest.mark.parametrize("instruction_set", ("scalar", "avx2", "avx512"))
def test_instruction_sets(instruction_set, monkeypatch):
    """AVX512-BF16 is what avx512 becomes where nobody asks for it by name."""
    battery_cases.check_on(instruction_set, "schedule", monkeypatch)


def reads_what_is_unused(outputs, arguments):
    return tuple(o + 0 * arguments[4] if o.numel() else o for o in outputs)


def a_little_off(outputs, arguments):
    return tuple(o * (1 + 2**-20) for o in outputs)


def mixes_samples(outputs, arguments):
    return tuple(o + 1e-3 * o.mean() if o.numel() else o for o in outputs)


def writes_its_input(outputs, arguments):
    arguments[0].view(-1)[:1] += 1
    return outputs


@pytest.mark.parametrize(
    ("wrong", "caught"),
    [
        (reads_what_is_unused, "finite where fp64 is not, or the reverse"),
        (a_little_off, "error"),
        (mixes_samples, "alone it differs"),
        (writes_its_input, "u0 was written"),
    ],
)
def test_the_battery_notices_a_wrong_kernel(monkeypatch, wrong, caught):
    right = OPERATORS["scheduler_step"].reference
    monkeypatch.setitem(OPERATORS["scheduler_step"].overloads, "reference", lambda *a: wrong(right(*a), a))
    unused = scheduler_step.PLAIN.but(inputs=3, rows=scheduler_step.UNUSED, values=scheduler_step.nan_where_unused)
    judge = prepared(unused.subject(), False)(torch.device("cpu"), (FP32,))
    with mk.use_backend("reference"):
        assert any(caught in failure for failure in judge().failures)
