"""The correctness cases: `mmgen-kernels check` runs them on the user's device, tests/ parametrises over them.

A case prepares its inputs and their fp64 truth once, and returns a judge: a function that runs the operator by whatever
implementation is in force and compares. Truth is always computed on the CPU, so that a device is never its own judge.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from mmgen_kernels import backends
from mmgen_kernels.library import OPERATORS

T = TypeVar("T")
Dtypes = tuple[torch.dtype, ...]  # of the float inputs, in the operator's order; without any, of the result
SHORT_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "int64"}


@dataclass(frozen=True)
class Outcome:
    """What one implementation did on one case."""

    error: float = 0.0  # relative to fp64; of indices: the share that differ
    repeatable: bool = True
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One set of inputs of one operator, and the law by which results are judged."""

    family: str
    operator: str
    name: str
    dtypes: tuple[Dtypes, ...]
    prepare: Callable[[torch.device, Dtypes], Callable[[], Outcome]]
    quick: bool = False  # part of `check --quick`


@dataclass
class Row:
    """A line of the table: one operator by one implementation in one dtype, over all cases."""

    operator: str
    implementation: str
    dtype: str
    cases: int = 0
    worst_error: float = 0.0
    repeatable: bool = True
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.repeatable and not self.failures

    def add(self, case: str, outcome: Outcome) -> None:
        self.cases += 1
        self.worst_error = max(self.worst_error, outcome.error)
        self.repeatable &= outcome.repeatable
        self.failures += [f"{case}: {failure}" for failure in outcome.failures]


def cases(family: str | None = None) -> list[Case]:
    """All cases, or those of one family."""
    if family is not None and family not in backends.FAMILIES:
        raise ValueError(f"family must be one of {', '.join(backends.FAMILIES)} or None, got {family!r}")
    wanted = backends.FAMILIES if family is None else (family,)
    return [case for name in wanted for case in importlib.import_module(f"mmgen_kernels.battery.{name}").CASES]


def dtype_name(dtypes: Dtypes) -> str:
    """fp32 where all are alike, else bf16/fp32."""
    return "/".join(SHORT_NAMES[d] for d in dict.fromkeys(dtypes))


def implementations(operator: str, device: torch.device) -> list[str]:
    """Those that can serve `operator` on `device`, the preferred one first."""
    return [i for i in backends.IMPLEMENTATIONS if not backends.reasons_against(OPERATORS[operator], i, device.type)]


def run(
    device: torch.device | str = "cpu",
    *,
    family: str | None = None,
    quick: bool = False,
    only: Iterable[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Runs the cases by every implementation that serves them on `device`.

    Args:
        device: where the operators run.
        family: vq, modulation, attn or philox; None means every family.
        quick: only the cases marked so.
        only: implementations to run; None means all that can serve.
        progress: called before each case with (number, total, name).

    Returns:
        One Row per (operator, implementation, dtype). A case that raises counts as failed and does not stop the rest.
    """
    device = torch.device(device)
    chosen = [case for case in cases(family) if case.quick or not quick]
    rows: dict[tuple[str, str, str], Row] = {}
    for number, case in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen), f"{case.operator} {case.name}")
        served = [i for i in implementations(case.operator, device) if only is None or i in only]
        for dtypes in case.dtypes:
            judge = case.prepare(device, dtypes) if served else None
            for implementation in served:
                key = (case.operator, implementation, dtype_name(dtypes))
                rows.setdefault(key, Row(*key)).add(case.name, _judged(judge, implementation))
    order = list(OPERATORS)
    return sorted(rows.values(), key=lambda r: (order.index(r.operator), r.implementation))


def _judged(judge: Callable[[], Outcome] | None, implementation: str) -> Outcome:
    assert judge is not None
    try:
        with backends.use_backend(implementation):
            return judge()
    except Exception as error:  # a kernel that does not run is a result, and the other cases still count
        return Outcome(error=float("inf"), failures=(f"{type(error).__name__}: {error}",))


def on_other_threads(call: Callable[[], T]) -> T:
    """The call on 2 threads, or on 1 where there are more. For judges of CPU operators."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        return call()
    finally:
        torch.set_num_threads(before)
