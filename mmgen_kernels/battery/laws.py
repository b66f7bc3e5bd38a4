"""The laws that the families' judges share: the error against fp64, the same bits in every run and on any number of threads, and
inputs that are left as they were. Each returns what is wrong, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.battery import on_other_threads, tolerance

Tensors = dict[str, Tensor]
# of the width of a float
INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def errors(results: Tensors, plain: Tensors, truth: Tensors) -> tuple[float, list[str]]:
    """By battery/tolerance.py, of each result; and the largest of the errors, relative to fp64."""
    found = [tolerance.failure(name, result, plain[name], truth[name]) for name, result in results.items()]
    return max([0.0, *(error for error, _ in found)]), [failure for _, failure in found if failure]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with NaN = NaN and -0 != +0."""
    view = INTEGERS.get(a.dtype)
    return a.dtype == b.dtype and torch.equal(*(t.contiguous().view(view) if view else t for t in (a, b)))


def differences(what: str, pairs: list[tuple[Any, Tensors, Tensors]]) -> list[str]:
    """Of (where, results, others): the results that have not the bits of the others."""
    return [f"{n}: {what} {where}".rstrip() for where, a, b in pairs for n in b if not same_bits(a[n].detach(), b[n].detach())]


def repeats(results: Tensors, once: Callable[[], Tensors]) -> bool:
    return not differences("", [("", results, once())])


def changed_by_threads(device: torch.device, results: Tensors, once: Callable[[], Tensors]) -> list[str]:
    if device.type != "cpu":
        return []
    return differences("the number of threads changes it", [("", results, on_other_threads(once))])


def written(t: Tensors, before: Tensors) -> list[str]:
    """`before`: copies on the CPU."""
    return [f"{n} was written" for n, v in t.items() if not same_bits(v.detach().cpu(), before[n])]
