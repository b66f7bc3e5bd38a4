"""What `mmgen-kernels check` runs on the user's device, for the tests of each family: every case by every implementation."""

import functools

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

CPU = torch.device("cpu")


@functools.lru_cache(1)  # the fp64 truth is the dear part, and one case's implementations follow each other
def judge(case, dtypes):
    return case.prepare(CPU, dtypes)


def parameters(family):
    for case in battery.cases(family):
        for dtypes in case.dtypes:
            for implementation in battery.implementations(case.operator, CPU):
                name = f"{case.operator}-{case.name}-{battery.dtype_name(dtypes)}-{implementation}"
                yield pytest.param(case, dtypes, implementation, id=name)


def check(case, dtypes, implementation):
    with mk.use_backend(implementation):
        outcome = judge(case, dtypes)()
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.repeatable
