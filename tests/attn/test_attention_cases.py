"""The battery, case by case."""

import battery_cases
import pytest


@pytest.mark.unpoisoned  # deterministic algorithms would hide an operator that is not repeatable
@pytest.mark.parametrize(("case", "dtypes", "implementation"), list(battery_cases.parameters("attn")))
def test_case(case, dtypes, implementation):
    battery_cases.check(case, dtypes, implementation)
