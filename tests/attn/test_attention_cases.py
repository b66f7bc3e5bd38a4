"""The battery, case by case, and what every instruction set must pass of it."""

import battery_cases
import pytest

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
@pytest.mark.parametrize("instruction_set", ("scalar", "avx2", "avx512", "avx512_bf16", "amx"))
def test_instruction_sets(instruction_set, monkeypatch):
    battery_cases.check_on(instruction_set, "attn", monkeypatch)
