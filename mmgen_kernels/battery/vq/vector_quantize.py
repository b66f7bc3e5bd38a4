"""Cases of vector_quantize and of its backward.

The laws: indices as nearest_code's; quantized holds the codes bit for bit; losses and gradients by the tolerance of
battery/tolerance.py; every output and gradient the same bits in every run and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import INTEGERS, changed_by_threads, errors, repeats, same_bits
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.battery.vq.nearest_code import FEW, MIXED, SAME, definition, some
from mmgen_kernels.vq import reference

NAMES = ("quantized", "indices", "loss", "commitment_loss", "codebook_loss")
DEFAULTS: dict[str, Any] = {"beta": 0.25, "legacy_beta": False, "gradient": "straight_through", "metric": "l2"}
# In the sum that is differentiated; exact in every dtype, so that the fp64 run sees the same upstream gradients.
LOSS_WEIGHTS = {"loss": 1.0, "commitment_loss": 0.75, "codebook_loss": -0.375}
RUNS = 20
Inputs = tuple[Tensor, Tensor, Tensor | None]  # x, codebook, mask


def run(call: Callable, x: Tensor, codebook: Tensor, upstream: Tensor, uses: tuple[str, ...]) -> dict[str, Tensor]:
    """Outputs and gradients of `call(x, codebook)`, when the outputs named by `uses` are differentiated."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    results = dict(zip(NAMES, call(x, codebook), strict=True))
    # the loss has its terms' dtype, so the sum is fp64 for fp64 and fp32 otherwise, in every implementation
    total = sum(LOSS_WEIGHTS[name] * results[name] for name in uses if name != "quantized")
    if "quantized" in uses:
        total = total + (results["quantized"] * upstream.to(results["quantized"].dtype)).sum(dtype=results["loss"].dtype)
    gradients = torch.autograd.grad(total, (x, codebook), allow_unused=True)
    for name, gradient, of in zip(("grad_x", "grad_codebook"), gradients, (x, codebook), strict=True):
        results[name] = torch.zeros_like(of) if gradient is None else gradient
    return {name: value.detach() for name, value in results.items()}


def prepared(inputs: Callable[[torch.device, Any], Inputs], gradients: bool, uses: tuple[str, ...], **changed: Any) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged, else the outputs."""
    options = DEFAULTS | changed

    def prepare(device: torch.device, dtypes):
        x, codebook, mask = inputs(device, dtypes)
        on_cpu = (x.cpu(), codebook.cpu(), None if mask is None else mask.cpu())
        upstream = randn(*x.shape, seed=8).to(torch.promote_types(x.dtype, codebook.dtype))
        truth_indices = definition(*on_cpu, options["metric"])

        def plain(rows, codes):
            return reference.vector_quantize(rows, codes, on_cpu[2], **options, precision="exact")

        truth = run(plain, on_cpu[0].double(), on_cpu[1].double(), upstream, uses)
        spoil_gradients(truth, truth_indices)
        same_dtype = run(plain, on_cpu[0], on_cpu[1], upstream, uses)
        upstream = upstream.to(device)

        def once() -> dict[str, Tensor]:
            return run(lambda rows, codes: mk.vector_quantize(rows, codes, mask=mask, **options), x, codebook, upstream, uses)

        def judge() -> Outcome:
            results = once()
            failures = [] if gradients else structural_failures(results, truth_indices, x, codebook)
            judged = ("grad_x", "grad_codebook") if gradients else NAMES[2:]
            worst, wrong = errors({name: results[name] for name in judged}, same_dtype, truth)
            failures += wrong + changed_by_threads(device, results, once)
            return Outcome(worst, repeats(results, once), tuple(failures))

        return judge

    return prepare


def spoil_gradients(truth: dict[str, Tensor], indices: Tensor) -> None:
    """The contract for rows at no finite distance: their whole gradient is NaN, and that of the codes they chose."""
    broken = truth["quantized"].isnan().any(-1)  # (...)
    truth["grad_x"][broken] = torch.nan
    if truth["grad_codebook"].dim() == 2:
        truth["grad_codebook"][indices[broken]] = torch.nan


def structural_failures(results: dict[str, Tensor], truth_indices: Tensor, x: Tensor, codebook: Tensor) -> list[str]:
    """What must hold exactly: indices, and quantized = the codes of those indices, 0 where masked, NaN where not finite."""
    if not torch.equal(results["indices"].cpu(), truth_indices):
        return [f"indices: {int((results['indices'].cpu() != truth_indices).sum())} of {truth_indices.numel()} differ from fp64"]
    dtype = torch.promote_types(x.dtype, codebook.dtype)
    codes = reference.gather(codebook.cpu(), truth_indices).to(dtype)
    finite = (x.cpu().double() - codes.double()).square().sum(-1, keepdim=True).isfinite()
    expected = torch.where(finite, codes, torch.nan)
    expected = torch.where((truth_indices >= 0).unsqueeze(-1), expected, 0)
    quantized = results["quantized"].cpu()
    if quantized.dtype != dtype or not torch.equal(quantized.isnan(), expected.isnan()):
        found, wanted = int(quantized.isnan().sum()), int(expected.isnan().sum())
        return [f"quantized: got {quantized.dtype} with {found} NaN, expected {dtype} with {wanted}"]
    different = quantized.contiguous().view(INTEGERS[dtype]) != expected.contiguous().view(INTEGERS[dtype])
    wrong = int((different & ~expected.isnan()).sum())
    return [f"quantized: {wrong} of {expected.numel()} values are not the codes bit for bit"] if wrong else []


def repeated(device: torch.device, dtypes) -> Callable[[], Outcome]:
    """The codebook's gradient, to which many rows contribute, over many runs."""
    x, codebook = (v.to(device) for v in DATA_SETS["gaussian"](4096, 7, 24, *dtypes))
    upstream = torch.zeros_like(x)

    def judge() -> Outcome:
        def call(rows, codes):
            return mk.vector_quantize(rows, codes)

        first = run(call, x, codebook, upstream, ("loss",))["grad_codebook"]
        again = (run(call, x, codebook, upstream, ("loss",))["grad_codebook"] for _ in range(RUNS - 1))
        return Outcome(0.0, all(same_bits(first, other) for other in again))

    return judge


def data(name: str, n: int = 67, k: int = 29, d: int = 24) -> Callable[[torch.device, Any], Inputs]:
    def inputs(device: torch.device, dtypes: Any) -> Inputs:
        x, codebook = DATA_SETS[name](n, k, d, *dtypes)
        return x.to(device), codebook.to(device), None

    return inputs


def laid_out(change: Callable[[Tensor, Tensor], Inputs]) -> Callable[[torch.device, Any], Inputs]:
    return lambda device, dtypes: change(*(v.to(device) for v in DATA_SETS["gaussian"](96, 36, 24, *dtypes)))


# x comes as (96, 24), the codebook as (36, 24)
LAYOUTS: dict[str, Callable[[Tensor, Tensor], Inputs]] = {
    "mask": lambda x, c: (x, c, some(96, like=x)),
    "mask_all_false": lambda x, c: (x, c, torch.zeros(96, dtype=torch.bool, device=x.device)),
    "mask_hides_nan": lambda x, c: (torch.where(some(96, like=x)[:, None], x, torch.nan), c, some(96, like=x)),
    "no_rows": lambda x, c: (x[:0], c, None),
    "one_row": lambda x, c: (x[0], c, None),
    "one_code": lambda x, c: (x, c[:1], None),
    "heads": lambda x, c: (x.view(4, 24, 24), c.view(4, 9, 24), None),
    "heads_mask": lambda x, c: (x.view(4, 24, 24), c.view(4, 9, 24), some(4, 24, like=x)),
    "heads_from_channels": lambda x, c: (x.view(96, 4, 6).transpose(0, 1), c.view(36, 4, 6).transpose(0, 1), None),
    "heads_no_rows": lambda x, c: (x.view(4, 24, 24)[:, :0], c.view(4, 9, 24), None),
    "no_heads": lambda x, c: (x.view(4, 24, 24)[:0], c.view(4, 9, 24)[:0], None),
    "images_channels_first": lambda x, c: (x.view(2, 24, 6, 8).permute(0, 2, 3, 1), c, None),
    "strided_rows": lambda x, c: (x[::3], c[1::2], None),
    "expanded_rows": lambda x, c: (x[:1].expand(9, 24), c, None),
    "transposed_codebook": lambda x, c: (x, c.t().contiguous().t(), None),
}
ALL = ("quantized", "loss", "commitment_loss", "codebook_loss")
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "legacy_beta": {"legacy_beta": True},
    "beta_0": {"beta": 0.0},
    "beta_2": {"beta": 2.0},
    "rotation": {"gradient": "rotation"},
    "rotation_legacy_beta": {"gradient": "rotation", "legacy_beta": True},
    "cosine": {"metric": "cosine"},
    "dot": {"metric": "dot"},
}
# data on which fp32 sums of squares neither overflow nor vanish
FORWARD_DATA = (
    "gaussian",
    "normalised",
    "taming",
    "offset",
    "spread",
    "fourfold",
    "zeros",
    "negative_zeros",
    "grid",
    "hits",
    "near_ties",
)
QUICK = ("defaults", "rotation", "mask", "heads")
NOT_FINITE = ("nan_rows", "inf_rows", "nan_codes", "inf_codes", "all_nan_codes")


def pair(
    name: str, inputs: Callable, dtypes: tuple, *, uses: tuple[str, ...] = ALL, quick: bool = False, **options: Any
) -> list[Case]:
    """The same inputs judged forward and backward."""
    return [
        Case("vq", "vector_quantize", name, dtypes, prepared(inputs, False, uses, **options), quick),
        Case("vq", "vector_quantize_backward", name, dtypes, prepared(inputs, True, uses, **options), quick),
    ]


CASES = [
    *[c for name, o in OPTIONS.items() for c in pair(f"options_{name}", data("gaussian"), SAME, quick=name in QUICK, **o)],
    *[c for use in ALL for c in pair(f"only_{use}", data("gaussian"), FEW, uses=(use,))],
    *pair("only_quantized_rotation", data("gaussian"), FEW, uses=("quantized",), gradient="rotation"),
    *[c for name in FORWARD_DATA for c in pair(name, data(name), SAME)],
    *[c for name in NOT_FINITE for c in pair(name, data(name), FEW)],
    *[c for name in ("gaussian", "taming") for c in pair(f"{name}_mixed_dtypes", data(name), MIXED)],
    *[c for name, change in LAYOUTS.items() for c in pair(name, laid_out(change), FEW, quick=name in QUICK)],
    *[c for name in ("mask", "heads_mask") for c in pair(f"{name}_rotation", laid_out(LAYOUTS[name]), FEW, gradient="rotation")],
    *[c for d in (1, 3, 257) for c in pair(f"width_{d}", data("gaussian", 33, 19, d), FEW)],
    Case("vq", "vector_quantize_backward", "codebook_gradient_20_runs", FEW, repeated, quick=True),
]  # fmt: skip
