"""The battery, case by case."""

from itertools import combinations

import battery_cases
import pytest

HALVED = ("residual_quantize", "code_entropy")  # two thirds of what the whole product takes
CASES = list(battery_cases.parameters("vq", HALVED))


@pytest.mark.unpoisoned  # deterministic algorithms would hide an operator that is not repeatable
@pytest.mark.parametrize(("case", "dtypes", "implementation"), CASES)
def test_case(case, dtypes, implementation):
    battery_cases.check(case, dtypes, implementation)


@pytest.mark.parametrize("operator", HALVED)
def test_any_three_factors_meet(operator):
    """In what runs without the long half: name, dtypes, implementation, direction."""

    def triples(cases):
        factors = (
            (case.name, dtypes, implementation, case.operator)
            for case, dtypes, implementation in (parameter.values for parameter in cases)
            if case.operator.removesuffix("_backward") == operator
        )
        return {triple for chosen in factors for triple in combinations(enumerate(chosen), 3)}

    assert triples(CASES) == triples(parameter for parameter in CASES if not parameter.marks)
