"""Cases of residual_quantize and of its backward.

The laws: at every level the index of nearest_code on the residual of that level; quantized is the sum of the codes bit for bit;
losses, statistics and gradients by the tolerance of battery/tolerance.py, against an fp64 run along the same indices; everything
the same bits in every run and on any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.battery.laws import changed_by_threads, errors, repeats, same_bits
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.battery.vq.nearest_code import FEW, MIXED, SAME, some
from mmgen_kernels.battery.vq.vector_quantize import FORWARD_DATA, NOT_FINITE, RUNS
from mmgen_kernels.vq import reference
from mmgen_kernels.vq.ops.residual import check_levels, join_codebooks

DEFAULTS: dict[str, Any] = {"beta": 0.25, "gradient": "straight_through", "metric": "l2"}
LOSS_WEIGHTS = (1.0, 0.75, -0.375, 0.5)  # of the levels, in the sum that is differentiated; exact in every dtype
LEVELS = 4
BOTH = ("quantized", "loss")


@dataclass
class Inputs:
    """codebooks = form(codes): what is given to the operator is made of the tensor that gets the gradient."""

    x: Tensor
    codes: Tensor
    levels: int | Tensor | None = None
    mask: Tensor | None = None
    form: Callable[[Tensor], Any] = lambda codes: codes


def run(call: Callable, x: Tensor, codes: Tensor, upstream: Tensor, uses: tuple[str, ...]) -> dict[str, Tensor]:
    """Outputs and gradients of `call(x, codes)`, when the outputs named by `uses` are differentiated."""
    x, codes = x.detach().requires_grad_(), codes.detach().requires_grad_()
    quantized, indices, loss, counts, sums = call(x, codes)
    weights = torch.tensor(LOSS_WEIGHTS[: len(loss)], dtype=loss.dtype, device=loss.device)
    total = (loss * weights).sum() if "loss" in uses else loss.new_zeros(())
    if "quantized" in uses:
        total = total + (quantized * upstream.to(quantized.dtype)).sum(dtype=loss.dtype)
    gradients = torch.autograd.grad(total, (x, codes), allow_unused=True)
    results = {"quantized": quantized, "indices": indices, "counts": joined(counts), "sums": joined(sums)}
    # each loss is a number of its own, judged as such
    results |= {f"loss[{level}]": value for level, value in enumerate(loss)}
    for name, gradient, of in zip(("grad_x", "grad_codebooks"), gradients, (x, codes), strict=True):
        results[name] = torch.zeros_like(of) if gradient is None else gradient
    return {name: value.detach() for name, value in results.items()}


def joined(statistics: Tensor | list[Tensor]) -> Tensor:
    return statistics if isinstance(statistics, Tensor) else torch.cat(statistics)


@functools.lru_cache(len(MIXED))  # a case's forward and backward follow each other, each with all its dtypes
def evidence(
    inputs: Callable[[torch.device, Any], Inputs], uses: tuple[str, ...], options: tuple, device: torch.device, dtypes: tuple
) -> tuple[Inputs, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, the gradient of quantized, and the results along the defined indices: in fp64, and in the inputs' dtypes."""
    given, chosen = inputs(device, dtypes), dict(options)
    x, codes = given.x.cpu(), given.codes.cpu()
    upstream = randn(*x.shape, seed=8).to(torch.promote_types(x.dtype, codes.dtype))
    indices = definition(given, chosen["metric"])

    def plain(rows: Tensor, leaf: Tensor):
        books, sizes = join_codebooks(given.form(leaf))
        wide = torch.promote_types(torch.promote_types(rows.dtype, books.dtype), torch.float32)
        along = (lambda level, _: indices[..., level], chosen["beta"], chosen["gradient"], wide)
        return reference.quantize_levels(rows, books, sizes, *along)

    truth = run(plain, x.double(), codes.double(), upstream, uses)
    return given, upstream.to(device), truth, run(plain, x, codes, upstream, uses)


def prepared(inputs: Callable[[torch.device, Any], Inputs], gradients: bool, uses: tuple[str, ...], **changed: Any) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged, else the outputs."""
    options = DEFAULTS | changed

    def prepare(device: torch.device, dtypes):
        given, upstream, truth, same_dtype = evidence(inputs, uses, tuple(options.items()), device, dtypes)

        def ours(rows: Tensor, leaf: Tensor):
            return mk.residual_quantize(
                rows, given.form(leaf), levels=given.levels, mask=given.mask, statistics=True, **options
            )

        def once() -> dict[str, Tensor]:
            return run(ours, given.x, given.codes, upstream, uses)

        def judge() -> Outcome:
            results = once()
            failures = [] if gradients else structural_failures(results, same_dtype)
            outputs = [n for n in results if n.startswith("loss")] + ["sums"]
            judged = ["grad_x", "grad_codebooks"] if gradients else outputs
            worst, wrong = errors({name: results[name] for name in judged}, same_dtype, truth)
            failures += wrong + changed_by_threads(device, results, once)
            return Outcome(worst, repeats(results, once), tuple(failures))

        return judge

    return prepare


def definition(given: Inputs, metric: str) -> Tensor:
    """The indices, level after level, on the CPU."""
    x, mask = given.x.cpu(), None if given.mask is None else given.mask.cpu()
    levels = given.levels.cpu() if isinstance(given.levels, Tensor) else given.levels
    books, sizes = join_codebooks(given.form(given.codes.cpu()))
    depth, per_sample = check_levels(levels, x, len(sizes) or len(books))
    return reference.residual_quantize(x, books, sizes, per_sample, mask, depth, 0.0, "straight_through", metric, "exact", None)[1]


def structural_failures(results: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What must hold bit for bit: indices, how many rows each code has, and the sum of the codes."""
    for name in ("indices", "counts", "quantized"):
        found, wanted = results[name].cpu(), expected[name]
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            return [f"{name}: got {found.dtype} {tuple(found.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"]
        wrong = int(((found != wanted) & ~(found.isnan() & wanted.isnan())).sum())
        if wrong:
            return [f"{name}: {wrong} of {wanted.numel()} differ from the definition"]
        if name == "quantized" and not torch.equal(found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan()):
            return ["quantized: the sign of a zero differs from the definition"]
    return []


def repeated(device: torch.device, dtypes) -> Callable[[], Outcome]:
    """The codebooks' gradient, to which many rows contribute, over many runs."""
    x, codes = gaussian(4096, 7, 24, dtypes)
    x, codes, upstream = x.to(device), codes.to(device), torch.zeros_like(x, device=device)

    def judge() -> Outcome:
        def call(rows, leaf):
            return mk.residual_quantize(rows, leaf, statistics=True)

        def results():
            return run(call, x, codes, upstream, ("loss",))

        first = results()
        return Outcome(0.0, all(same_bits(first[n], v) for _ in range(RUNS - 1) for n, v in results().items()))

    return judge


def gaussian(n: int, k: int, d: int, dtypes: Any, name: str = "gaussian", levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """A data set whose codes become `levels` codebooks, each half as large as the one before: residuals shrink."""
    x, codes = DATA_SETS[name](n, levels * k, d, *dtypes)
    halves = 0.5 ** torch.arange(levels, dtype=torch.float64).view(-1, 1, 1)
    return x, codes.view(levels, k, d) * halves.to(codes.dtype)


def data(name: str, n: int = 53, k: int = 13, d: int = 24) -> Callable[[torch.device, Any], Inputs]:
    def inputs(device: torch.device, dtypes: Any) -> Inputs:
        x, codes = gaussian(n, k, d, dtypes, name)
        return Inputs(x.to(device), codes.to(device))

    return inputs


def laid_out(change: Callable[[Tensor, Tensor], Inputs]) -> Callable[[torch.device, Any], Inputs]:
    return lambda device, dtypes: change(*(v.to(device) for v in gaussian(48, 9, 24, dtypes)))


def per_sample(like: Tensor) -> Tensor:
    """Numbers of levels for 4 samples, one below what is possible and one above."""
    return torch.tensor([2, -3, 99, 1], device=like.device)


# x comes as (48, 24), the codebooks as (4, 9, 24)
LAYOUTS: dict[str, Callable[[Tensor, Tensor], Inputs]] = {
    "mask": lambda x, c: Inputs(x, c, mask=some(48, like=x)),
    "mask_all_false": lambda x, c: Inputs(x, c, mask=torch.zeros(48, dtype=torch.bool, device=x.device)),
    "mask_hides_nan": lambda x, c: Inputs(torch.where(some(48, like=x)[:, None], x, torch.nan), c, mask=some(48, like=x)),
    "levels_0": lambda x, c: Inputs(x, c, levels=0),
    "levels_2": lambda x, c: Inputs(x, c, levels=2),
    "levels_per_sample": lambda x, c: Inputs(x.view(4, 12, 24), c, levels=per_sample(x)),
    "levels_per_sample_mask": lambda x, c: Inputs(x.view(4, 3, 4, 24), c, levels=per_sample(x), mask=some(4, 3, 4, like=x)),
    "levels_per_row": lambda x, c: Inputs(x, c, levels=randint(0, 5, (48,), seed=3).to(x.device)),
    "levels_strided": lambda x, c: Inputs(x.view(4, 12, 24), c, levels=per_sample(x).repeat_interleave(2)[::2]),
    "shared_codebook": lambda x, c: Inputs(x, c[0], form=lambda codes: codes.expand(4, 9, 24)),
    "shared_transposed": lambda x, c: Inputs(x, c[0].t().contiguous().t(), form=lambda codes: codes.expand(4, 9, 24)),
    "sizes": lambda x, c: Inputs(x, c.flatten(0, 1), form=lambda codes: list(codes.split((5, 1, 20, 10)))),
    "sizes_mask": lambda x, c: Inputs(x, c.flatten(0, 1), mask=some(48, like=x), form=lambda codes: codes.split((30, 6))),
    "one_level": lambda x, c: Inputs(x, c[:1]),
    "no_rows": lambda x, c: Inputs(x[:0], c),
    "no_rows_levels": lambda x, c: Inputs(x.view(4, 12, 24)[:, :0], c, levels=per_sample(x)),
    "no_samples": lambda x, c: Inputs(x[:0], c, levels=torch.zeros(0, dtype=torch.int64, device=x.device)),
    "one_row": lambda x, c: Inputs(x[0], c),
    "one_code": lambda x, c: Inputs(x, c[:, :1]),
    "images_channels_first": lambda x, c: Inputs(x.view(2, 24, 6, 4).permute(0, 2, 3, 1), c),
    "strided_rows": lambda x, c: Inputs(x[::3], c[:, 1::2]),
    "strided_levels": lambda x, c: Inputs(x, c.transpose(0, 1).contiguous().transpose(0, 1)),
    "strided_columns": lambda x, c: Inputs(x[:, ::2], c[..., ::2]),
    "expanded_rows": lambda x, c: Inputs(x[:1].expand(9, 24), c),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "beta_0": {"beta": 0.0},
    "beta_2": {"beta": 2.0},
    "rotation": {"gradient": "rotation"},
    "cosine": {"metric": "cosine"},
    "dot": {"metric": "dot"},
}
QUICK = ("defaults", "rotation", "mask", "levels_per_sample", "sizes")


def pair(
    name: str, inputs: Callable, dtypes: tuple, *, uses: tuple[str, ...] = BOTH, quick: bool = False, **options: Any
) -> list[Case]:
    """The same inputs judged forward and backward."""
    return [
        Case("vq", "residual_quantize", name, dtypes, prepared(inputs, False, uses, **options), quick),
        Case("vq", "residual_quantize_backward", name, dtypes, prepared(inputs, True, uses, **options), quick),
    ]


CASES = [
    *[c for name, o in OPTIONS.items() for c in pair(f"options_{name}", data("gaussian"), SAME, quick=name in QUICK, **o)],
    *[c for use in BOTH for c in pair(f"only_{use}", data("gaussian"), FEW, uses=(use,))],
    *pair("only_quantized_rotation", data("gaussian"), FEW, uses=("quantized",), gradient="rotation"),
    *[c for name in FORWARD_DATA for c in pair(name, data(name), SAME)],
    *[c for name in NOT_FINITE for c in pair(name, data(name), FEW)],
    *[c for name in ("gaussian", "taming") for c in pair(f"{name}_mixed_dtypes", data(name), MIXED)],
    *[c for name, change in LAYOUTS.items() for c in pair(name, laid_out(change), FEW, quick=name in QUICK)],
    *pair("mask_rotation", laid_out(LAYOUTS["mask"]), FEW, gradient="rotation"),
    *pair("levels_rotation", laid_out(LAYOUTS["levels_per_sample_mask"]), FEW, gradient="rotation"),
    *[c for d in (1, 3, 257) for c in pair(f"width_{d}", data("gaussian", 33, 11, d), FEW)],
    Case("vq", "residual_quantize_backward", "codebook_gradient_20_runs", FEW, repeated, quick=True),
]  # fmt: skip
