"""Cases of diffusion_loss and of its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Dtypes
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.schedule.guidance import channels_last, halves
from mmgen_kernels.battery.schedule.law import BF16, FEW, FP32, FP64, SAME, Subject, Tensors, pair

SHAPE = (5, 4, 37)


def element_losses(output: Tensor, target: Tensor, kind: str, delta: Tensor) -> Tensor:
    """`delta` broadcasts with the samples."""
    difference = output - target
    if kind == "mse":
        return difference.square()
    if kind == "pseudo_huber":
        return torch.sqrt(difference.square() + delta.square()) - delta
    magnitude = difference.abs()
    huber = torch.where(magnitude <= delta, difference.square() / 2, delta * (magnitude - delta / 2))
    return huber / delta if kind == "smooth_l1" else huber


def subject(
    kind: str = "mse",
    *,
    shape: tuple[int, ...] = SHAPE,
    delta: float | None = 1.0,
    weight: bool = True,
    mask: tuple[int, ...] | None = None,
    reduction: str = "none",
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    scale: float = 1.0,
) -> Subject:
    """`delta` of None is one per sample."""
    B = shape[0]

    def arguments(device: torch.device, dtypes: Dtypes) -> Tensors:
        given = (randn(*shape, seed=i) * scale for i in range(2))
        pairs = zip(("output", "target"), given, (dtypes[0], dtypes[-1]), strict=True)
        t = {name: layout(values.to(dtype)) for name, values, dtype in pairs}
        if weight:
            t["weight"] = (randn(B, seed=3).abs() + 0.1).to(FP64 if dtypes[0] == FP64 else FP32)
        if delta is None:
            t["delta"] = (randn(B, seed=4).abs() + 0.05).to(FP64 if dtypes[0] == FP64 else FP32)
        if mask is not None:
            t["mask"] = randn(*mask, seed=5) > 0
            if mask[0] > 1:
                t["mask"][0] = False  # a sample that has nothing
            # what is masked may be anything
            t["output"] = torch.where(t["mask"], t["output"], torch.nan)
        return {n: v.to(device) for n, v in t.items()}

    def call(t: Tensors) -> tuple[Tensor, ...]:
        chosen = t["delta"] if delta is None else delta
        return (mk.diffusion_loss(t["output"], t["target"], weight=t.get("weight"), kind=kind, delta=chosen, mask=t.get("mask"),
                                  reduction=reduction),)  # fmt: skip

    def formula(t: Tensors) -> tuple[Tensor, ...]:
        output, target = t["output"], t["target"]
        dtype = torch.promote_types(output.dtype, target.dtype)
        deltas = t.get("delta", torch.full((B,), delta or 1.0, dtype=dtype)).to(dtype).reshape(-1, *[1] * (len(shape) - 1))
        valid = t.get("mask", torch.ones(1, dtype=torch.bool)).expand(shape)
        each = element_losses(torch.where(valid, output, 0), torch.where(valid, target, 0), kind, deltas)
        of_samples = tuple(range(1, len(shape)))
        means = (each.sum(of_samples) / valid.sum(of_samples).clamp(min=1)) if of_samples else torch.where(valid, each, 0)
        losses = t["weight"].to(means.dtype) * means if weight else means
        return (losses.mean() if reduction == "mean" else losses,)

    shared = ("mask",) if mask is not None and mask[0] == 1 else ()
    return Subject(arguments, call, formula, None, shared, reduction == "none", ("delta",))


MASKS = {"elements": SHAPE, "channels": (5, 1, 37), "samples": (5, 4, 1), "columns": (1, 1, 37)}
HUBERS = ("huber", "smooth_l1", "pseudo_huber")
CASES = [
    *pair("diffusion_loss", "mse", subject(shape=(4, 4, 16, 16)), SAME, quick=True),
    *pair("diffusion_loss", "mean", subject(reduction="mean"), SAME, quick=True),
    *[c for k in HUBERS for c in pair("diffusion_loss", k, subject(k, delta=0.3), SAME, quick=True)],
    *[c for k in HUBERS for c in pair("diffusion_loss", f"{k}_by_sample", subject(k, delta=None), FEW)],
    *[c for n, m in MASKS.items() for c in pair("diffusion_loss", f"mask_of_{n}", subject(mask=m), FEW, quick=n == "channels")],
    *pair("diffusion_loss", "mask_in_four_dimensions", subject("huber", shape=(3, 4, 5, 6), mask=(3, 1, 5, 1)), FEW),
    *pair("diffusion_loss", "no_weight", subject(weight=False), FEW),
    *pair("diffusion_loss", "long", subject("pseudo_huber", shape=(2, 8200), delta=0.01), FEW),
    *pair("diffusion_loss", "long_mask", subject(shape=(2, 3, 4100), mask=(2, 1, 4100)), FEW),
    *pair("diffusion_loss", "rank_1", subject(shape=(5,)), FEW),
    *pair("diffusion_loss", "channels_last", subject(shape=(2, 3, 4, 5), layout=channels_last), FEW),
    *pair("diffusion_loss", "halves", subject(layout=halves), FEW),
    *pair("diffusion_loss", "large", subject("huber", scale=1e4, delta=1e3), FEW),
    *pair("diffusion_loss", "small", subject("pseudo_huber", scale=1e-4, delta=1e-3), FEW),
    *pair("diffusion_loss", "no_samples", subject(shape=(0, 4)), FEW),
    *pair("diffusion_loss", "no_elements", subject(shape=(3, 0)), FEW),
    *pair("diffusion_loss", "mixed", subject("smooth_l1"), ((FP32, BF16), (BF16, FP32))),
]
