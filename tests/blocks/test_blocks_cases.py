"""The battery, case by case, and what every instruction set must pass of it."""

import battery_cases
import pytest

from mmgen_kernels.battery.blocks import BLOCKS
from mmgen_kernels.library import OPERATORS


@pytest.mark.unpoisoned  # deterministic algorithms would hide an operator that is not repeatable
@pytest.mark.parametrize(("case", "dtypes", "implementation"), [*battery_cases.parameters("blocks", halved=BLOCKS)])
def test_case(case, dtypes, implementation):
    battery_cases.check(case, dtypes, implementation)


@pytest.mark.skipif(not OPERATORS["mlp_activation"].has_cpp, reason="the C++ part is not built")
@pytest.mark.parametrize("instruction_set", ("scalar", "avx2", "avx512"))
def test_instruction_sets(instruction_set, monkeypatch):
    battery_cases.check_on(instruction_set, "blocks", monkeypatch)
