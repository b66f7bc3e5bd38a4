"""Cases of code_entropy and of its backward.

The laws: entropies and gradients by the tolerance of battery/tolerance.py, against a dense fp64 computation and autograd of it;
NaN where the docstring says so; every result the same bits in every run, on any number of threads and, of a row, in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.draws import rand, randn
from mmgen_kernels.battery.laws import changed_by_threads, errors, repeats, same_bits
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.battery.vq.nearest_code import FEW, LAYOUTS, MIXED, SAME
from mmgen_kernels.vq.ops import METRICS

NAMES = ("sample_entropy", "mean_entropy")
GRADIENTS = ("grad_x", "grad_codebook")
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "metric": "l2", "eps": 0.0}
Inputs = tuple[Tensor, Tensor, Tensor | None]  # x, codebook, mask


def dense(
    x: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float, metric: str, eps: float, differences: bool = False
) -> tuple[Tensor, Tensor]:
    """What model code writes, with its N x K matrix. `differences`: |x - c|^2 from differences, which do not cancel."""
    dtype = torch.promote_types(x.dtype, codebook.dtype)
    heads = codebook.shape[:-2]
    rows = x.to(dtype).reshape(*heads, -1 if x.numel() else 0, x.shape[-1])  # (H, N, D) or (N, D)
    codes = codebook.to(dtype)
    valid = rows.new_ones(rows.shape[:-1], dtype=torch.bool) if mask is None else mask.reshape(rows.shape[:-1])
    rows = torch.where(valid[..., None], rows, 0)
    if metric == "cosine":
        rows, codes = (unit(v) for v in (rows, codes))
    if metric != "l2":
        scores = rows @ codes.mT  # (H, N, K) or (N, K)
    elif differences:
        scores = -(rows.unsqueeze(-2) - codes.unsqueeze(-3)).square().sum(-1)
    else:
        scores = -(rows.square().sum(-1, keepdim=True) + codes.square().sum(-1).unsqueeze(-2) - 2 * rows @ codes.mT)
    log_p = (scores / temperature).log_softmax(-1)
    p = log_p.exp()
    sample_entropy = torch.where(valid, -(p * log_p).sum(-1), 0)
    q = torch.where(valid[..., None], p, 0).sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)  # (H, K) or (K,)
    positive = q != 0
    mean_entropy = -torch.where(positive, q * (torch.where(positive, q, 1) + eps).log(), 0).sum(-1)
    return sample_entropy.view(x.shape[:-1]), mean_entropy


def unit(vectors: Tensor) -> Tensor:
    squared = vectors.square().sum(-1, keepdim=True)
    return torch.where(squared == 0, 0, vectors / torch.where(squared == 0, 1, squared).sqrt())


def run(call: Callable, x: Tensor, codebook: Tensor, upstream: tuple[Tensor, Tensor], uses: tuple[str, ...]) -> dict[str, Tensor]:
    """Entropies and gradients of `call(x, codebook)`, when the entropies named by `uses` are differentiated."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    results = dict(zip(NAMES, call(x, codebook), strict=True))
    chosen = [(results[name], weight.to(results[name])) for name, weight in zip(NAMES, upstream, strict=True) if name in uses]
    gradients = torch.autograd.grad([r for r, _ in chosen], (x, codebook), [w for _, w in chosen])
    return {name: value.detach() for name, value in (*results.items(), *zip(GRADIENTS, gradients, strict=True))}


def spoil(truth: dict[str, Tensor], x: Tensor, codebook: Tensor, mask: Tensor | None, uses: tuple[str, ...]) -> None:
    """The contract for rows and codes that are not finite."""
    bad = ~x.isfinite().all(-1)
    if mask is not None:
        bad &= mask
    if not codebook.isfinite().all():
        bad = torch.ones_like(bad)
    if not bad.any():
        return
    truth["sample_entropy"][bad] = torch.nan
    truth["mean_entropy"].fill_(torch.nan)
    truth["grad_x"][bad if "mean_entropy" not in uses else ...] = torch.nan
    truth["grad_codebook"].fill_(torch.nan)


@functools.lru_cache(len(MIXED))  # a case's forward and backward follow each other, each with all its dtypes
def evidence(
    inputs: Callable[[torch.device, Any], Inputs], uses: tuple[str, ...], options: tuple, device: torch.device, dtypes: tuple
) -> tuple[Inputs, tuple[Tensor, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, the gradients of the entropies, and the results of the dense computation: in fp64, and as model code has them."""
    x, codebook, mask = inputs(device, dtypes)
    on_cpu = (x.cpu(), codebook.cpu(), None if mask is None else mask.cpu())
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    upstream = randn(*x.shape[:-1], seed=8).to(wide), (rand(*codebook.shape[:-2], seed=9) - 2).to(wide)

    def exactly(rows, codes):
        return dense(rows, codes, on_cpu[2], **dict(options), differences=True)

    def plainly(rows, codes):
        return dense(rows, codes, on_cpu[2], **dict(options))

    truth = run(exactly, on_cpu[0].double(), on_cpu[1].double(), upstream, uses)
    spoil(truth, *on_cpu, uses)
    plain = run(plainly, on_cpu[0].to(wide), on_cpu[1].to(wide), upstream, uses)
    for name, of in zip(GRADIENTS, on_cpu[:2], strict=True):
        if of.dtype.itemsize == 2:  # what is rounded to 16 bits has the error of 16 bits for a bar
            plain[name] = run(plainly, on_cpu[0].to(of.dtype), on_cpu[1].to(of.dtype), upstream, uses)[name]
        plain[name] = plain[name].to(of.dtype)
    return (x, codebook, mask), (upstream[0].to(device), upstream[1].to(device)), truth, plain


def prepared(inputs: Callable[[torch.device, Any], Inputs], gradients: bool, uses: tuple[str, ...], **changed: Any) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged, else the entropies."""
    options = DEFAULTS | changed

    def prepare(device: torch.device, dtypes):
        (x, codebook, mask), upstream, truth, plain = evidence(inputs, uses, tuple(options.items()), device, dtypes)

        def once() -> dict[str, Tensor]:
            return run(lambda rows, codes: mk.code_entropy(rows, codes, mask=mask, **options), x, codebook, upstream, uses)

        def judge() -> Outcome:
            results = once()
            failures = [] if gradients else variant_failures(results["sample_entropy"], x, codebook, mask, options)
            judged = GRADIENTS if gradients else NAMES
            worst, wrong = errors({name: results[name] for name in judged}, plain, truth)
            failures += wrong + changed_by_threads(device, results, once)
            return Outcome(worst, repeats(results, once), tuple(failures))

        return judge

    return prepare


def variant_failures(sample_entropy: Tensor, x: Tensor, codebook: Tensor, mask: Tensor | None, options: dict) -> list[str]:
    """A row's entropy must not depend on the rows around it."""
    axis = codebook.dim() - 2  # the first axis that counts rows
    if x.dim() <= axis + 1 or x.shape[axis] < 2:
        return []
    failures = []
    for rows in (slice(0, 1), slice(-1, None), slice(1, 1 + x.shape[axis] // 2)):
        part = (*[slice(None)] * axis, rows)
        alone = mk.code_entropy(x[part], codebook, mask=None if mask is None else mask[part], **options).sample_entropy
        if not same_bits(alone, sample_entropy[part]):
            failures.append(f"rows {rows} alone differ from the same rows in the batch")
    return failures


def data(name: str, n: int = 257, k: int = 77, d: int = 24) -> Callable[[torch.device, Any], Inputs]:
    def inputs(device: torch.device, dtypes: Any) -> Inputs:
        x, codebook = DATA_SETS[name](n, k, d, *dtypes)
        return x.to(device), codebook.to(device), None

    return inputs


def laid_out(change: Callable[[Tensor, Tensor], Inputs]) -> Callable[[torch.device, Any], Inputs]:
    return lambda device, dtypes: change(*(v.to(device) for v in DATA_SETS["gaussian"](96, 37, 24, *dtypes)))


OPTIONS: dict[str, dict[str, Any]] = {
    **{metric: {"metric": metric} for metric in METRICS},
    **{f"{metric}_cold": {"metric": metric, "temperature": 0.1, "eps": 1e-5} for metric in METRICS},
    **{f"{metric}_hot": {"metric": metric, "temperature": 37.0} for metric in METRICS},
    "ibq": {"metric": "dot", "temperature": 0.01, "eps": 1e-5},
    "llamagen": {"metric": "l2", "temperature": 0.01, "eps": 1e-5},
    "one_half": {"eps": 0.5},
}
ONLY = {"sample": NAMES[:1], "mean": NAMES[1:]}
# fp64 is judged where scores are of order 1: elsewhere the truth, of fp64 too, is as far from the real numbers as the result.
NARROW = SAME[1:]
# Data on which fp32 scores neither overflow nor vanish.
GOOD_DATA = (
    "gaussian",
    "normalised",
    "taming",
    "offset",
    "spread",
    "fourfold",
    "all_equal",
    "zeros",
    "all_zero",
    "hits",
    "near_ties",
)
NOT_FINITE = ("nan_rows", "inf_rows", "nan_codes", "inf_codes", "inf_rows_nan_codes", "all_nan_codes")
SIZES = ((1, 1, 1), (1, 64, 3), (2, 65, 1), (33, 7, 257), (31, 128, 16), (65, 200, 5), (1100, 2150, 4))  # N, K, D
QUICK = ("options_l2", "options_cosine", "ibq", "mixed_dtypes", "mask", "heads")


def pair(
    name: str, inputs: Callable, dtypes: tuple, *, uses: tuple[str, ...] = NAMES, quick: bool = False, **options: Any
) -> list[Case]:
    """The same inputs judged forward and backward."""
    quick = quick or name in QUICK
    return [
        Case("vq", "code_entropy", name, dtypes, prepared(inputs, False, uses, **options), quick),
        Case("vq", "code_entropy_backward", name, dtypes, prepared(inputs, True, uses, **options), quick),
    ]


CASES = [
    *[c for name, o in OPTIONS.items() for c in pair(f"options_{name}", data("gaussian"), NARROW, **o)],
    *[c for m in METRICS for c in pair(f"normalised_fp64_{m}", data("normalised"), SAME[:1], metric=m, eps=1e-5)],
    *[c for name, uses in ONLY.items() for c in pair(f"only_{name}", data("gaussian"), FEW, uses=uses, metric="cosine")],
    *[c for name in GOOD_DATA for metric in METRICS for c in pair(f"{name}_{metric}", data(name), FEW, metric=metric)],
    *[c for name in NOT_FINITE for metric in METRICS for c in pair(f"{name}_{metric}", data(name), FEW, metric=metric)],
    *[c for name in NOT_FINITE[:2] for c in pair(f"{name}_only_sample", data(name), FEW[:1], uses=NAMES[:1])],
    *pair("mixed_dtypes", data("normalised"), MIXED),
    # by such temperatures scores are of order 1: all rows count, and no case hangs on the roundings of a few
    *[c for name, change in LAYOUTS.items() for c in pair(name, laid_out(change), FEW, temperature=6.0)],
    *[c for s in SIZES for c in pair("x".join(map(str, s)), data("gaussian", *s), FEW, temperature=float(s[2]))],
]  # fmt: skip
