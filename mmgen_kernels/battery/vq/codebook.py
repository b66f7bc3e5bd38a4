"""Cases of what trains a codebook: gather_codes, code_statistics, update_codebook_ema_, replace_dead_codes_.

The laws: codes, counts and replaced codes are the same bits as by the definition, spelt out in plain loops; sums, averages and
gradients stay within the tolerance of battery/tolerance.py; everything is the same bits in every run and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.draws import rand, randint, randn
from mmgen_kernels.battery.laws import changed_by_threads, errors, repeats, same_bits
from mmgen_kernels.battery.vq.nearest_code import FEW, SAME

Results = dict[str, Tensor]
Run = Callable[[dict[str, Any]], Results]
TRAINED = ("codebook", "cluster_size", "code_sum")


def prepared(make: Callable[..., dict[str, Any]], run: Run, plain: Run, exact: tuple[str, ...]) -> Callable:
    """`prepare` of a case: `run` by the implementation in force against `plain` in fp64, by the tolerance; results named in `exact`
    bit for bit against `plain` in the dtype itself."""

    def prepare(device: torch.device, dtypes) -> Callable[[], Outcome]:
        inputs = make(dtypes[0])
        wide = {k: v.double() if is_float(v) else v for k, v in inputs.items()}
        narrow, truth = plain(inputs), plain(wide)
        there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

        def judge() -> Outcome:
            results = run(there)
            worst, failures = errors({n: v for n, v in results.items() if n not in exact}, narrow, truth)
            for name in (n for n in results if n in exact):
                value, wanted = results[name].cpu(), narrow[name]
                if not same_bits(*(t.nan_to_num(nan=0.5) if is_float(t) else t for t in (value, wanted))):
                    failures.append(f"{name}: {int((value != wanted).sum())} of {value.numel()} values differ")
            failures += changed_by_threads(device, results, lambda: run(there))
            return Outcome(worst, repeats(results, lambda: run(there)), tuple(failures))

        return judge

    return prepare


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def gradient_of(result: Tensor, of: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(result, of, upstream.to(result.dtype))[0]


# -- inputs -----------------------------------------------------------------------------------------------------------


def rows_and_indices(
    lead: tuple[int, ...], num_codes: int, dim: int, *, heads: bool = False, masked: bool = False, popular: bool = False
) -> Callable[[torch.dtype], dict[str, Any]]:
    """Indices from -1, no code, to num_codes, one past the end; `popular`: nearly all rows choose code 0."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        indices = randint(-1, num_codes + 1, lead, 3)
        if popular:
            indices = torch.where(rand(*lead, seed=4) < 0.97, 0, indices)
        books = lead[:1] if heads else ()
        return {
            "x": randn(*lead, dim, seed=1).to(dtype),
            "codebook": randn(*books, num_codes, dim, seed=2).to(dtype),
            "indices": indices,
            "mask": rand(*lead, seed=5) < 0.7 if masked else None,
            "heads": heads,
            "num_codes": num_codes,
            "up_codes": randn(*lead, dim, seed=6).to(dtype),
            "up_sums": randn(*books, num_codes, dim, seed=7).to(torch.promote_types(dtype, torch.float32)),
        }

    return make


def permuted(make: Callable) -> Callable:
    """The same values in layouts that are dense, and not contiguous."""

    def turned(dtype: torch.dtype) -> dict[str, Any]:
        def turn(t: Any) -> Any:
            return t.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(t, Tensor) and t.dim() > 1 else t

        return {k: turn(v) for k, v in make(dtype).items()}

    return turned


def with_nan(make: Callable) -> Callable:
    def spoilt(dtype: torch.dtype) -> dict[str, Any]:
        inputs = make(dtype)
        inputs["x"][0] = torch.nan
        inputs["x"][3] = torch.inf
        inputs["codebook"][..., 0, 0] = torch.nan
        return inputs

    return spoilt


def averages(lead: tuple[int, ...], num_codes: int, dim: int, *, normalize: bool = False) -> Callable:
    """A codebook of `dtype` with averages in fp32 or better, and the statistics of a batch."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        kept = torch.promote_types(dtype, torch.float32)
        counts = randint(0, 9, (*lead, num_codes), 3)
        return {
            "codebook": randn(*lead, num_codes, dim, seed=1).to(dtype),
            "cluster_size": rand(*lead, num_codes, seed=2).to(kept) * 8,
            "code_sum": randn(*lead, num_codes, dim, seed=4).to(kept),
            "counts": counts,
            "sums": (randn(*lead, num_codes, dim, seed=5) * counts[..., None]).to(kept),
            "normalize": normalize,
        }

    return make


def dying(
    books: tuple[int, ...],
    rows: tuple[int, ...],
    num_codes: int,
    dim: int,
    *,
    masked: bool = False,
    normalize: bool = False,
    unit: float = 1.0,
) -> Callable:
    """Cluster sizes are 0 to 4 units, and the threshold is two."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        kept = torch.promote_types(dtype, torch.float32)
        return {
            "codebook": randn(*books, num_codes, dim, seed=1).to(dtype),
            "cluster_size": (randint(0, 5, (*books, num_codes), 2) * torch.tensor(unit, dtype=torch.float64)).to(kept),
            "code_sum": randn(*books, num_codes, dim, seed=4).to(kept),
            "x": randn(*rows, dim, seed=5).to(dtype),
            "mask": rand(*rows, seed=6) < 0.4 if masked else None,
            "key": torch.tensor([7, -(2**40)]),
            "threshold": 2 * unit,
            "normalize": normalize,
        }

    return make


# -- ours, and the same in plain PyTorch ------------------------------------------------------------------------------


def gather_ours(i: dict[str, Any]) -> Results:
    return {"codes": mk.gather_codes(i["codebook"], i["indices"])}


def gather_plain(i: dict[str, Any]) -> Results:
    return {"codes": looked_up(i["codebook"], i["indices"], i["heads"])}


def looked_up(codebook: Tensor, indices: Tensor, heads: bool) -> Tensor:
    safe = indices.clamp(0, codebook.shape[-2] - 1)
    codes = torch.stack([c[s] for c, s in zip(codebook, safe, strict=True)]) if heads else codebook[safe]
    return torch.where(indices[..., None] < 0, torch.zeros((), dtype=codes.dtype), codes)


def gather_backward_ours(i: dict[str, Any]) -> Results:
    codebook = i["codebook"].detach().requires_grad_()
    return {"grad_codebook": gradient_of(mk.gather_codes(codebook, i["indices"]), codebook, i["up_codes"])}


def gather_backward_plain(i: dict[str, Any]) -> Results:
    return {"grad_codebook": added_up(i["up_codes"], i["indices"], None, i["num_codes"], i["heads"])}


def added_up(x: Tensor, indices: Tensor, mask: Tensor | None, num_codes: int, heads: bool) -> Tensor:
    """Sums by code in x's own dtype, by index_add_."""
    if heads:
        masks = [None] * len(x) if mask is None else mask
        return torch.stack([added_up(*a, num_codes, False) for a in zip(x, indices, masks, strict=True)])
    present = indices >= 0 if mask is None else (indices >= 0) & mask
    places = indices.clamp(max=num_codes - 1)[present]
    return torch.zeros(num_codes, x.shape[-1], dtype=x.dtype).index_add_(0, places, x[present])


def statistics_ours(i: dict[str, Any]) -> Results:
    return mk.code_statistics(i["x"], i["indices"], i["num_codes"], mask=i["mask"], heads=i["heads"])._asdict()


def statistics_plain(i: dict[str, Any]) -> Results:
    wide = i["x"].to(torch.promote_types(i["x"].dtype, torch.float32))
    ones = torch.ones(*i["x"].shape[:-1], 1, dtype=torch.int64)
    rest = (i["indices"], i["mask"], i["num_codes"], i["heads"])
    return {"counts": added_up(ones, *rest)[..., 0], "sums": added_up(wide, *rest)}


def statistics_backward_ours(i: dict[str, Any]) -> Results:
    x = i["x"].detach().requires_grad_()
    sums = mk.code_statistics(x, i["indices"], i["num_codes"], mask=i["mask"], heads=i["heads"]).sums
    return {"grad_x": gradient_of(sums, x, i["up_sums"])}


def statistics_backward_plain(i: dict[str, Any]) -> Results:
    indices = i["indices"] if i["mask"] is None else i["indices"].masked_fill(~i["mask"], -1)
    return {"grad_x": looked_up(i["up_sums"], indices, i["heads"]).to(i["x"].dtype)}


def ema_ours(i: dict[str, Any]) -> Results:
    codebook, cluster_size, code_sum = trained = [i[name].clone() for name in TRAINED]
    averaging = {"decay": 0.9, "eps": 1e-3, "normalize": i["normalize"]}
    mk.update_codebook_ema_(codebook, cluster_size, code_sum, i["counts"], i["sums"], **averaging)
    return dict(zip(TRAINED, trained, strict=True))


def ema_plain(i: dict[str, Any]) -> Results:
    size = i["cluster_size"].lerp(i["counts"].to(i["cluster_size"]), 0.1)
    total = i["code_sum"].lerp(i["sums"], 0.1)
    everything = size.sum(-1, keepdim=True)
    codes = total / ((size + 1e-3) / (everything + size.shape[-1] * 1e-3) * everything)[..., None]
    if i["normalize"]:
        codes = torch.nn.functional.normalize(codes, dim=-1)
    return {"codebook": codes.to(i["codebook"].dtype), "cluster_size": size, "code_sum": total}


def replace_ours(i: dict[str, Any]) -> Results:
    codebook, cluster_size, code_sum = trained = [i[name].clone() for name in TRAINED]
    options = {"threshold": i["threshold"], "reset_cluster_size": 1.5, "normalize": i["normalize"], "mask": i["mask"]}
    mk.replace_dead_codes_(codebook, cluster_size, code_sum, i["x"], i["key"], **options)
    return dict(zip(TRAINED, trained, strict=True))


def replace_plain(i: dict[str, Any]) -> Results:
    codebook, size, total = (i[name].clone().view(-1, *i[name].shape[i["codebook"].dim() - 2 :]) for name in TRAINED)
    rows = i["x"].reshape(len(codebook), -1, codebook.shape[-1])
    mask = torch.ones(rows.shape[:2], dtype=torch.bool) if i["mask"] is None else i["mask"].reshape(rows.shape[:2])
    with mk.use_backend("reference"):
        draws = mk.philox_integers(rows.shape[:2], i["key"])
    for h in range(len(codebook)):
        order = sorted((int(w), n) for n, w in enumerate(draws[h]) if mask[h, n])
        dead = [k for k, s in enumerate(size[h].tolist()) if s < i["threshold"]]
        for k, (_, n) in zip(dead, order, strict=False):
            row = rows[h, n].double()
            codebook[h, k] = row / row.norm().clamp(min=1e-12) if i["normalize"] else row
            total[h, k] = codebook[h, k].double() * 1.5
            size[h, k] = 1.5
    return {name: t.view_as(i[name]) for name, t in zip(TRAINED, (codebook, size, total), strict=True)}


# -- cases ------------------------------------------------------------------------------------------------------------

INDEXED = {
    "plain": rows_and_indices((53,), 11, 5),
    "one_code": rows_and_indices((9,), 1, 3),
    "one_row": rows_and_indices((1,), 4, 1),
    "no_rows": rows_and_indices((0,), 4, 3),
    "rank_4": rows_and_indices((2, 3, 7), 6, 17),
    "heads": rows_and_indices((3, 40), 7, 4, heads=True),
    "heads_mask": rows_and_indices((2, 5, 8), 7, 65, heads=True, masked=True),
    "mask": rows_and_indices((61,), 5, 33, masked=True),
    "popular": rows_and_indices((700,), 9, 12, popular=True),
    "permuted": permuted(rows_and_indices((2, 9, 7), 6, 10)),
    "nan": with_nan(rows_and_indices((53,), 11, 5)),
}
AVERAGES = {
    "plain": averages((), 23, 7),
    "heads": averages((3,), 8, 33),
    "one_code": averages((), 1, 1),
    "normalize": averages((2,), 9, 5, normalize=True),
    "many": averages((), 3000, 4),
}
DYING = {
    "plain": dying((), (90,), 30, 5),
    "more_dead_than_rows": dying((), (4,), 30, 5),
    "no_rows": dying((), (0,), 6, 3),
    "heads": dying((3,), (3, 5, 8), 17, 6),
    "mask": dying((), (7, 9), 40, 6, masked=True),
    "normalize": dying((2,), (2, 33), 12, 4, normalize=True),
    "more_dead_than_valid": dying((), (20,), 40, 3, masked=True),
    "one_code": dying((), (9,), 1, 3),
    "one_row": dying((), (1,), 4, 1),
    "threshold_between_floats": dying((), (40,), 30, 5, unit=0.35),  # 0.7 in fp32 is less than 0.7
    "many": dying((2,), (2, 1200), 300, 3),
}
QUICK = ("plain", "heads", "mask")

CASES = [
    Case("vq", operator, name, SAME if name == "plain" else FEW, prepared(make, run, plain, exact), name in QUICK)
    for operator, inputs, run, plain, exact in (
        ("gather_codes", INDEXED, gather_ours, gather_plain, ("codes",)),
        ("gather_codes_backward", INDEXED, gather_backward_ours, gather_backward_plain, ()),
        ("code_statistics", INDEXED, statistics_ours, statistics_plain, ("counts",)),
        ("code_statistics_backward", INDEXED, statistics_backward_ours, statistics_backward_plain, ("grad_x",)),
        ("update_codebook_ema_", AVERAGES, ema_ours, ema_plain, ()),
        ("replace_dead_codes_", DYING, replace_ours, replace_plain, TRAINED),
    )
    for name, make in inputs.items()
]
