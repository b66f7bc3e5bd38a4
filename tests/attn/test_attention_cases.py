"""The battery, case by case, and what every instruction set must pass of it."""

import battery_cases
import pytest

from mmgen_kernels import battery
from mmgen_kernels.battery.attn.attention import COVER
from mmgen_kernels.library import OPERATORS


def in_a_normal_run():
    """All of it, but the cover of head dimensions and lengths by the preferred implementation alone."""
    preferred = "cpp" if OPERATORS["attention"].has_cpp else "reference"
    for parameter in battery_cases.parameters("attn", halved=("attention",)):
        case, _, implementation = parameter.values
        beside = case.name in COVER and implementation != preferred
        yield pytest.param(*parameter.values, id=parameter.id, marks=[*parameter.marks, *([pytest.mark.long] if beside else [])])


@pytest.mark.unpoisoned  # deterministic algorithms would hide an operator that is not repeatable
@pytest.mark.parametrize(("case", "dtypes", "implementation"), [*in_a_normal_run()])
def test_case(case, dtypes, implementation):
    battery_cases.check(case, dtypes, implementation)


@pytest.mark.skipif(not OPERATORS["attention"].has_cpp, reason="the C++ part is not built")
@pytest.mark.parametrize("instruction_set", ("scalar", "avx2", "avx512"))
def test_instruction_sets(instruction_set, monkeypatch):
    """The cases above run the best one only."""
    probe = pytest.importorskip("mmgen_kernels._probe", reason="built with MMGEN_KERNELS_PROBE=1")
    if instruction_set not in probe.instruction_sets():
        pytest.skip(f"this CPU has no {instruction_set}")
    monkeypatch.setenv("MMGEN_KERNELS_CPU", instruction_set)
    assert probe.selected() == instruction_set
    for case in battery.cases("attn"):
        for dtypes in case.dtypes if case.quick else ():
            battery_cases.check(case, dtypes, "cpp")
