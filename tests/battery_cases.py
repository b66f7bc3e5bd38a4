"""What `mmgen-kernels check` runs on the user's device, for the tests of each family: every case by every implementation."""

import functools
import itertools

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

CPU = torch.device("cpu")


@functools.lru_cache(1)  # the fp64 truth is the dear part, and one case's implementations follow each other
def judge(case, dtypes):
    return case.prepare(CPU, dtypes)


def parameters(family, halved=()):
    """Every case by every implementation.

    Of the operators in `halved` and of their backward, half of the product is long: forward and backward take turns, so that any
    three of name, dtypes, implementation and direction still meet. Quick cases, and those of one dtype, stay whole.
    """
    cases = battery.cases(family)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(case.name for case in cases))}
    for case in cases:
        operator, backward, _ = case.operator.partition("_backward")
        served = battery.implementations(case.operator, CPU)
        whole = operator not in halved or case.quick or min(len(served), len(case.dtypes)) < 2
        for (j, dtypes), (i, implementation) in itertools.product(enumerate(case.dtypes), enumerate(served)):
            in_turn = (numbers[case.name] + j + i + bool(backward)) % 2 == 0
            name = f"{case.operator}-{case.name}-{battery.dtype_name(dtypes)}-{implementation}"
            yield pytest.param(case, dtypes, implementation, id=name, marks=() if whole or in_turn else pytest.mark.long)


def check(case, dtypes, implementation):
    with mk.use_backend(implementation):
        outcome = judge(case, dtypes)()
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.repeatable


def check_on(instruction_set, family, monkeypatch):
    """The quick cases of a family by C++ on the instruction set named; the other tests run the best one only."""
    probe = pytest.importorskip("mmgen_kernels._probe", reason="built with MMGEN_KERNELS_PROBE=1")
    if instruction_set not in probe.instruction_sets():
        pytest.skip(f"this CPU has no {instruction_set}")
    monkeypatch.setenv("MMGEN_KERNELS_CPU", instruction_set)
    assert probe.selected() == instruction_set
    for case in battery.cases(family):
        for dtypes in case.dtypes if case.quick else ():
            check(case, dtypes, "cpp")
