"""How a case of the family is judged.

The laws: results and gradients by the tolerance of battery/tolerance.py, against fp64 autograd of the formula, the bar being the
formula as it is written in the inputs' dtype; the same bits in every run, on any number of threads and, of a sample, whatever the
batch around it; inputs are never written. Noise that a key stands for is the normals of `philox_normal`, which has a battery of its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen_kernels.battery import Case, Dtypes, Outcome, on_other_threads, tolerance
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import Tensors, same_bits, written

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SAME = ((FP64,), (FP32,), (BF16,), (FP16,))
FEW = ((FP32,), (BF16,))


@dataclass(frozen=True)
class Subject:
    """An operator's arguments, the call, and the formula in whatever dtype the arguments have.

    `shared` are arguments of the whole batch: a sample alone has them as they are. `constant` ones have no gradient. `normals`
    are those that a key among the arguments stands for, by the implementation in force; the formula finds them as `z`.
    """

    arguments: Callable[[torch.device, Dtypes], Tensors]
    call: Callable[[Tensors], tuple[Tensor, ...]]
    formula: Callable[[Tensors], tuple[Tensor, ...]]
    normals: Callable[[Tensors], Tensor] | None = None
    shared: tuple[str, ...] = ()
    by_sample: bool = True  # not so where one key serves the whole batch
    constant: tuple[str, ...] = ()


def floats(t: Tensors) -> Tensors:
    return {n: v for n, v in t.items() if v.is_floating_point() and n not in ("coefficients", "table", "t")}


def run(
    function: Callable[[Tensors], tuple[Tensor, ...]], t: Tensors, upstream: list[Tensor] | None, constant: tuple[str, ...] = ()
) -> list[Tensor]:
    """Outputs or, given the gradients of those, the gradients of every float tensor but tables, times and constants."""
    if upstream is None:
        return list(function(t))
    leaves = {n: v.detach().requires_grad_() for n, v in floats(t).items() if n not in constant}
    pairs = [(o, g.to(o)) for o, g in zip(function(t | leaves), upstream, strict=True) if o.requires_grad]
    outs, grads = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, list(leaves.values()), grads, materialize_grads=True))


def prepared(subject: Subject, gradients: bool) -> Callable[[torch.device, Dtypes], Callable[[], Outcome]]:
    def prepare(device: torch.device, dtypes: Dtypes) -> Callable[[], Outcome]:
        t = subject.arguments(device, dtypes)
        on_cpu = {n: v.detach().cpu().clone() for n, v in t.items()}
        exact = on_cpu | {n: v.double() for n, v in floats(on_cpu).items()}
        upstream = None
        if gradients:
            outputs = subject.call(t)
            upstream = [randn(*o.shape, seed=90 + i).to(dtypes[0]).double() for i, o in enumerate(outputs)]

        def expected(z: Tensors) -> list[list[Tensor]]:
            """By fp64, and by plain PyTorch in the inputs' dtype."""
            def by(t: Tensors) -> list[Tensor]:
                dtype = next(iter(floats(t).values())).dtype
                formula = lambda given: subject.formula(given | {n: v.to(dtype) for n, v in z.items()})  # noqa: E731
                return run(formula, t, upstream, subject.constant)

            return [by(exact), by(on_cpu)]

        found = expected({}) if subject.normals is None else None
        sent = None if upstream is None else [g.to(device) for g in upstream]

        def once(t: Tensors = t, sent: list[Tensor] | None = sent) -> list[Tensor]:
            return run(subject.call, t, sent, subject.constant)

        def judge() -> Outcome:
            results, worst, failures = once(), 0.0, []
            truth, plain = found or expected({"z": subject.normals(t).cpu()})  # type: ignore[misc]
            names = [n for n in floats(t) if n not in subject.constant] if gradients else [f"output {i}" for i in range(len(truth))]
            for name, result, bar, exact_result in zip(names, results, plain, truth, strict=True):
                error, failure = tolerance.failure(name, result, bar.to(result.dtype), exact_result)
                worst = max(worst, error)
                failures += [failure] if failure else []
            failures += written(t, on_cpu)
            if device.type == "cpu" and not all(map(same_bits, results, on_other_threads(once))):
                failures.append("the number of threads changes the bits")
            for b in {0, len(results[0]) - 1} if subject.by_sample and results[0].dim() and len(results[0]) > 1 else ():
                at = slice(b, b + 1)
                alone = {n: v if n in subject.shared else v[at] for n, v in t.items()}
                got = once(alone, None if sent is None else [g[at] for g in sent])
                if not all(map(same_bits, got, [r[at] for r in results])):
                    failures.append(f"alone it differs, sample {b}")
            return Outcome(worst, all(map(same_bits, results, once())), tuple(failures))

        return judge

    return prepare


def pair(
    operator: str, name: str, subject: Subject, dtypes: tuple[Dtypes, ...], *, quick: bool = False, differentiated: bool = True
) -> list[Case]:
    """The same inputs judged forward and backward."""
    cases = [Case("schedule", operator, name, dtypes, prepared(subject, False), quick)]
    if differentiated:
        cases.append(Case("schedule", f"{operator}_backward", name, dtypes, prepared(subject, True), quick))
    return cases
