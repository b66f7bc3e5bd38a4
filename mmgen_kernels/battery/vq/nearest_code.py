"""Cases of nearest_code. The law: the index that the fp64 definition gives, nothing else.

And the same index for a row alone as for a row in its batch, in every run, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome, on_other_threads
from mmgen_kernels.battery.draws import rand
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.vq import reference
from mmgen_kernels.vq.ops import METRICS

SAME = tuple((d, d) for d in DTYPES)
MIXED = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.float16, torch.float64),
)
FEW = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
MIXED_DATA = ("gaussian", "near_ties", "offset", "huge", "tiny", "inf_rows")
# None is a multiple of any tile of rows or codes; D on both sides of vector widths.
ODD_SIZES = ((1, 13, 1), (17, 11, 3), (33, 25, 5), (15, 129, 8), (65, 97, 16), (31, 255, 72), (9, 33, 257), (5, 61, 1024))
# More than one panel of codes (by their bytes, by their number), and more rows than are held at a time.
PANELS = ((3, 2100, 1024), (9, 24_700, 3), (65_600, 3, 2))


def definition(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    """The fp64 definition on the CPU."""
    return reference.nearest_code(x.cpu(), codebook.cpu(), None if mask is None else mask.cpu(), metric, "exact")


def judge_of(x: Tensor, codebook: Tensor, mask: Tensor | None, metrics: tuple[str, ...]) -> Callable[[], Outcome]:
    truths = {metric: definition(x, codebook, mask, metric) for metric in metrics}

    def judge() -> Outcome:
        wrong, total, repeatable, failures = 0, 0, True, []
        for metric, truth in truths.items():
            indices = mk.nearest_code(x, codebook, metric=metric, mask=mask)
            if indices.dtype != torch.int64 or indices.shape != truth.shape or indices.device != x.device:
                failures.append(f"{metric}: got {indices.dtype} {tuple(indices.shape)} on {indices.device}")
                continue
            differ = indices.cpu() != truth
            if differ.any():
                at = tuple(differ.nonzero()[0].tolist())
                failures.append(f"{metric}: {int(differ.sum())} of {truth.numel()} rows differ from fp64, first at {at}: "
                                f"got {int(indices[at])}, fp64 {int(truth[at])}")  # fmt: skip
            wrong += int(differ.sum())
            total += truth.numel()
            repeatable &= torch.equal(indices, mk.nearest_code(x, codebook, metric=metric, mask=mask))
            failures += [f"{metric}: {f}" for f in variant_failures(x, codebook, mask, metric, indices)]
        return Outcome(wrong / max(1, total), repeatable, tuple(failures))

    return judge


def variant_failures(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, indices: Tensor) -> list[str]:
    """A row's index must not depend on the rows around it, nor on the number of threads."""
    failures = []
    axis = codebook.dim() - 2  # the first axis that counts rows
    if x.dim() > axis + 1 and x.shape[axis] > 1:
        for rows in (slice(0, 1), slice(-1, None), slice(1, 1 + x.shape[axis] // 2)):
            part = (*[slice(None)] * axis, rows)
            alone = mk.nearest_code(x[part], codebook, metric=metric, mask=None if mask is None else mask[part])
            if not torch.equal(alone, indices[part]):
                failures.append(f"rows {rows} alone differ from the same rows in the batch")
    if x.device.type == "cpu" and not torch.equal(
        on_other_threads(lambda: mk.nearest_code(x, codebook, metric=metric, mask=mask)), indices
    ):
        failures.append("the number of threads changes the index")
    return failures


def on_data(data: str, sizes: tuple[int, int, int], metrics: tuple[str, ...] = METRICS) -> Callable:
    def prepare(device, dtypes):
        x, codebook = DATA_SETS[data](*sizes, *dtypes)
        return judge_of(x.to(device), codebook.to(device), None, metrics)

    return prepare


def laid_out(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]], sizes: tuple[int, int, int] = (96, 37, 24)
) -> Callable:
    """Inputs whose layout `change` makes on the device, where a copy would lose it."""

    def prepare(device, dtypes):
        x, codebook = DATA_SETS["gaussian"](*sizes, *dtypes)
        return judge_of(*change(x.to(device), codebook.to(device)), metrics=METRICS)

    return prepare


def some(*shape: int, like: Tensor) -> Tensor:
    """A mask with valid and invalid rows."""
    return (rand(*shape, seed=7) < 0.7).to(like.device)


# x comes as (96, 24), the codebook as (37, 24)
LAYOUTS = {
    "one_row_without_batch": lambda x, c: (x[0], c, None),
    "rank_4": lambda x, c: (x.view(2, 4, 12, 24), c, None),
    "channels_first": lambda x, c: (x.view(2, 24, 48).transpose(1, 2), c, None),
    "images_channels_first": lambda x, c: (x.view(2, 24, 6, 8).permute(0, 2, 3, 1), c, None),
    "permuted_rows": lambda x, c: (x.view(4, 24, 24).transpose(0, 1), c, None),
    "strided_columns": lambda x, c: (x[:, ::2], c[:, ::2], None),
    "chunk_of_columns": lambda x, c: (x.chunk(2, -1)[1], c.chunk(2, -1)[1], None),
    "strided_rows": lambda x, c: (x[::3], c[1::2], None),
    "offset_storage": lambda x, c: (x.flatten()[5 : 5 + 24 * 90].view(90, 24), c[3:], None),
    "transposed_codebook": lambda x, c: (x[:, :24], c.t().contiguous().t(), None),
    "expanded_rows": lambda x, c: (x[:1].expand(9, 24), c, None),
    "expanded_columns": lambda x, c: (x[:, :1].expand(96, 24), c, None),
    "mask": lambda x, c: (x, c, some(96, like=x)),
    "mask_all_false": lambda x, c: (x, c, torch.zeros(96, dtype=torch.bool, device=x.device)),
    "mask_transposed": lambda x, c: (x.view(4, 24, 24), c, some(24, 4, like=x).t()),
    "mask_hides_nan": lambda x, c: (torch.where(some(96, like=x)[:, None], x, torch.nan), c, some(96, like=x)),
    "no_rows": lambda x, c: (x[:0], c, None),
    "no_rows_inside": lambda x, c: (x.view(4, 24, 24)[:, :0], c, None),
    "no_rows_mask": lambda x, c: (x[:0], c, torch.ones(0, dtype=torch.bool, device=x.device)),
    "one_code": lambda x, c: (x, c[:1], None),
    "heads": lambda x, c: (x.view(4, 24, 24), c[:36].view(4, 9, 24), None),
    "heads_one_row_each": lambda x, c: (x[:4], c[:36].view(4, 9, 24), None),
    "heads_rank_4": lambda x, c: (x.view(4, 2, 12, 24), c[:36].view(4, 9, 24), None),
    "heads_from_channels": lambda x, c: (x.view(96, 4, 6).transpose(0, 1), c.view(37, 4, 6).transpose(0, 1), None),
    "heads_share_a_codebook": lambda x, c: (x.view(4, 24, 24), c.expand(4, 37, 24), None),
    "heads_mask": lambda x, c: (x.view(4, 24, 24), c[:36].view(4, 9, 24), some(4, 24, like=x)),
    "heads_no_rows": lambda x, c: (x.view(4, 24, 24)[:, :0], c[:36].view(4, 9, 24), None),
    "no_heads": lambda x, c: (x.view(4, 24, 24)[:0], c[:36].view(4, 9, 24)[:0], None),
    "one_head": lambda x, c: (x[None], c[None], None),
}


def fast(data: str) -> Callable:
    """precision="fast": the distance of the code found is the least one within the rounding of a pass in bf16."""

    def prepare(device, dtypes):
        x, codebook = (v.to(device) for v in DATA_SETS[data](65, 131, 24, *dtypes))
        distances = (x.cpu().double()[:, None] - codebook.cpu().double()).square().sum(-1)  # (N, K)
        radius = x.cpu().double().norm(dim=-1) + codebook.cpu().double().norm(dim=-1).max()  # (N,)
        # 2 x.c of factors rounded to bf16, each by at most 2^-8 of itself, and D + 8 roundings of an fp32 sum; on either side
        rounding = 2 * (2 * 2.0**-8 + 2.0**-16) / 4 + 2 * (x.shape[-1] + 8) * 2.0**-24  # |x| |c| <= radius^2 / 4
        allowed = 2 * rounding * radius.square()

        def judge() -> Outcome:
            indices = mk.nearest_code(x, codebook, precision="fast")
            excess = distances.gather(1, indices.cpu()[:, None])[:, 0] - distances.amin(1)
            beyond = int((excess > allowed).sum())
            failures = [f"{beyond} rows are further than the rounding of a pass in bf16 explains"] if beyond else []
            if not torch.equal(indices[5:6], mk.nearest_code(x[5:6], codebook, precision="fast")):
                failures.append("row 5 alone differs from row 5 in the batch")
            again = mk.nearest_code(x, codebook, precision="fast")
            return Outcome(beyond / len(x), torch.equal(indices, again), tuple(failures))

        return judge

    return prepare


def case(name: str, prepare: Callable, dtypes: tuple = SAME, quick: bool = False) -> Case:
    return Case("vq", "nearest_code", name, dtypes, prepare, quick)


CASES = [
    *[case(name, on_data(name, (37, 101, 12)), quick=True) for name in DATA_SETS],
    *[case(f"{name}_mixed_dtypes", on_data(name, (33, 61, 8)), MIXED) for name in MIXED_DATA],
    *[case(f"{name}_one_code", on_data(name, (19, 1, 7)), FEW) for name in ("gaussian", "zeros", "nan_rows", "nan_codes")],
    *[case("x".join(map(str, s)), on_data("gaussian", s), FEW) for s in ODD_SIZES],
    *[case("near_ties_" + "x".join(map(str, s)), on_data("near_ties", s), FEW) for s in ODD_SIZES],
    *[case("panels_" + "x".join(map(str, s)), on_data("fourfold", s, ("l2", "cosine")), FEW[:1]) for s in PANELS],
    *[case(name, laid_out(change), FEW, name in ("mask", "heads", "no_rows", "one_code")) for name, change in LAYOUTS.items()],
    *[case(f"fast_{name}", fast(name), SAME) for name in ("gaussian", "normalised", "taming", "offset", "fourfold", "clusters")],
]  # fmt: skip
