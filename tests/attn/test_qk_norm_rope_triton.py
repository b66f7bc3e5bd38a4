"""The Triton kernels of qk_norm_rope by the interpreter, without a GPU: the battery's cases, and what launches there are.

Each test runs in a process in which TRITON_INTERPRET is set, or there needs none.
"""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
from triton_interpreter import is_interpreted, prepare_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
# Cases of many programs take the interpreter minutes.
LARGE = ("64x1", "3x255", "2x257", "3x256", "many_heads", "many_heads_across", "one_wide_head")
CASES = {(c.operator, c.name): c for c in battery.cases("attn") if c.operator.startswith("qk_norm_rope")}


@pytest.fixture(scope="module")
def process():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
        assert pool.submit(is_interpreted).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    yield pool
    pool.shutdown()


def judge(operator, name):
    """All dtypes of a case; (dtypes, failures) of those that fail."""
    case, failed = CASES[operator, name], []
    for dtypes in case.dtypes:
        with mk.use_backend("triton"):
            outcome = case.prepare(CPU, dtypes)()
        if outcome.failures or not outcome.repeatable:
            failed.append((dtypes, outcome.failures, outcome.repeatable))
    return failed


def parameters():
    for (operator, name), case in CASES.items():
        marks = [] if case.quick else [pytest.mark.long]
        yield pytest.param(operator, name, id=f"{operator}-{name}", marks=marks)


@pytest.mark.parametrize(("operator", "name"), [*parameters()])
def test_case(process, operator, name):
    assert not process.submit(judge, operator, name).result()
