"""Cases of vq_diffusion_loss and of its backward. The formula is Bayes' rule over the transition matrices, not the closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Dtypes
from mmgen_kernels.battery.draws import rand, randint, randn
from mmgen_kernels.battery.schedule.discrete import DIFFUSIONS, KEPT, transitions
from mmgen_kernels.battery.schedule.law import FEW, FP32, FP64, SAME, Subject, Tensors, pair

SHAPE = (5, 4, 37)  # B, N, K
STEPS = (1, 0, 3, 4, 5)


def posteriors(row: Tensor, K: int) -> Tensor:
    """q(x_{t-1} | x_t, k), indexed [x_t, k, x_{t-1}], (K + 1, K, K + 1) in fp64; 0 where x_t cannot come of k."""
    step, _, before = transitions(row, K)
    joint = step.T[:, None, :] * before[None, :K, :]
    total = joint.sum(-1, keepdim=True)
    return torch.where(total > 0, joint / total, 0.0)


def divergences(logits: Tensor, x0: Tensor, x_t: Tensor, row: Tensor) -> Tensor:
    """Of one sample (N, K), (N,)."""
    K = logits.shape[-1]
    x0, x_t, of_all = x0.clamp(0, K - 1), x_t.clamp(0, K), posteriors(row, K)
    q = of_all[x_t, x0].to(logits.dtype)  # (N, K + 1)
    said = (logits.softmax(-1)[:, :, None] * of_all[x_t].to(logits.dtype)).sum(1)
    said = said / torch.where(x_t < K, said.sum(-1), 1)[:, None]  # where x_t cannot come of some k, of those that it can
    likely = torch.where(q > 0, said, 1)
    if row[6] == 1:  # the first step: as all do, by log_softmax, which does not underflow
        missed = -logits.log_softmax(-1).gather(-1, x0[:, None])[:, 0]
        return torch.where((x_t < K) & (row[1] == 0), 0, missed)  # where no code becomes another one
    return torch.where(q > 0, q * (q.log() - likely.log()), 0).sum(-1)


def subject(
    diffusion: str = "mask_and_replace",
    *,
    shape: tuple[int, int, int] = SHAPE,
    steps: int | tuple[int, ...] = STEPS,
    aux: float | None = None,
    aux_of_each: bool = False,
    weight: bool = False,
    mask: bool = False,
    reduction: str = "none",
    codes_first: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    values: Callable[[Tensor], Tensor] = lambda t: t,
    beyond: bool = False,
    on_host: bool = False,
) -> Subject:
    B, N, K = shape

    def arguments(device: torch.device, dtypes: Dtypes) -> Tensors:
        logits = values(2 * randn(B, N, K, seed=1)).to(dtypes[0])
        t = {"logits": layout(logits.mT.contiguous() if codes_first else logits)}
        wide = FP64 if dtypes[0] == FP64 else FP32
        t["x0"] = randint(0, K, (B, N), 2)
        kind = rand(B, N, seed=3)
        t["x_t"] = torch.where(kind < 0.4, t["x0"], randint(0, K, (B, N), 4) if diffusion != "absorbing" else K)
        if diffusion == "mask_and_replace":
            t["x_t"] = torch.where(kind > 0.7, K, t["x_t"])
        if beyond:
            t["x_t"] = torch.where(t["x_t"] == K, 2**40, torch.where(t["x_t"] == 0, -5, t["x_t"]))
            t["x0"] = torch.where(t["x0"] == K - 1, 2**40, torch.where(t["x0"] == 0, -5, t["x0"]))
        gammas = None if diffusion == "absorbing" else DIFFUSIONS[diffusion]
        table = mk.transition_table(KEPT, K, gammas_cumprod=gammas)
        if not on_host:
            t |= {"table": table, "step": torch.tensor(steps)[:B] if isinstance(steps, tuple) else torch.tensor(steps)}
        if weight:
            t["weight"] = (randn(B, seed=5).abs() + 0.1).to(wide)
        if aux is not None and aux_of_each:
            t["aux"] = ((randn(B, seed=6).abs() + 0.1) * aux).to(wide)
        if mask:
            t["mask"] = rand(B, N, seed=7) < 0.6
            t["mask"][:1] = False  # a sample that has nothing
            unseen = torch.where(t["mask"][..., None], 0.0, torch.nan).to(dtypes[0])  # what is masked may be anything
            t["logits"] = t["logits"] + (unseen.mT if codes_first else unseen)
        return {"table": table} | {n: v.to(device) for n, v in t.items()}

    def call(t: Tensors) -> tuple[Tensor, ...]:
        found = mk.vq_diffusion_loss(
            t["logits"], t["x0"], t["x_t"], t["table"], t["step"] if "step" in t else int(steps),  # type: ignore[arg-type]
            weight=t.get("weight"), aux_weight=t.get("aux", aux),  # type: ignore[arg-type]
            mask=t.get("mask"), dim=1 if codes_first else -1, reduction=reduction,
        )  # fmt: skip
        return tuple(each for each in found if each is not None)

    def formula(t: Tensors) -> tuple[Tensor, ...]:
        logits = t["logits"].mT if codes_first else t["logits"]
        valid = t.get("mask", torch.ones(B, N, dtype=torch.bool))
        logits = torch.where(valid[..., None], logits, 0)
        rows = t["table"][torch.as_tensor(t.get("step", steps)).clamp(0, len(t["table"]) - 1).expand(B)]
        each = [divergences(*of_sample) for of_sample in zip(logits, t["x0"], t["x_t"], rows.double(), strict=True)]
        vb = torch.where(valid, torch.stack(each) if each else logits.sum(-1), 0)  # (B, N)
        missed = -logits.log_softmax(-1).gather(-1, t["x0"].clamp(0, K - 1)[..., None])[..., 0]
        missed = torch.where(valid, missed, 0)
        share = t["aux"].to(vb.dtype)[:, None] if "aux" in t else torch.tensor(aux or 0, dtype=FP64).to(vb)
        loss = vb if aux is None else vb + share * missed
        loss = t["weight"].to(vb.dtype)[:, None] * loss if weight else loss
        of_samples = [each.sum(1) / valid.sum(1).clamp(min=1) for each in (loss, vb, missed)]
        if reduction == "places":
            of_samples[0] = loss
        if reduction == "mean":
            of_samples[0] = of_samples[0].mean()
        return tuple(of_samples[: 2 if aux is None else 3])

    by_step = ("table",) if isinstance(steps, tuple) else ("table", "step")
    return Subject(arguments, call, formula, None, by_step, reduction != "mean", ("weight", "aux"))


def every_other(t: Tensor) -> Tensor:
    """A view whose classes lie apart."""
    return torch.stack((t, t), -1)[..., 0]


def impossible(t: Tensor) -> Tensor:
    """Some codes have no probability; x0 and x_t, which any code may be, are left possible here and there."""
    return torch.where(torch.arange(t.shape[-1]) % 5 == 3, -torch.inf, t)


NAME = "vq_diffusion_loss"
CASES = [
    *[c for d in DIFFUSIONS for c in pair(NAME, d, subject(d), SAME, quick=True)],
    *[c for d in DIFFUSIONS for c in pair(NAME, f"{d}_first_step", subject(d, steps=(0,) * 5, reduction="places"), FEW)],
    *[c for d in DIFFUSIONS for c in pair(NAME, f"{d}_sharp", subject(d, values=lambda z: 8 * z), ((FP64,), (FP32,)))],
    *pair(NAME, "places", subject(reduction="places", aux=0.1, weight=True), FEW, quick=True),
    *pair(NAME, "mean", subject(reduction="mean", aux=0.3, aux_of_each=True, weight=True), FEW, quick=True),
    *pair(NAME, "codes_first", subject(codes_first=True, aux=0.001, shape=(3, 35, 53)), SAME, quick=True),
    *pair(NAME, "absorbing_codes_first", subject("absorbing", codes_first=True, shape=(2, 19, 70)), FEW),
    *pair(NAME, "mask", subject(mask=True, aux=0.3, weight=True), FEW, quick=True),
    *pair(NAME, "mask_of_places", subject("absorbing", mask=True, reduction="places", codes_first=True), FEW),
    *pair(NAME, "one_step", subject(steps=2), FEW),
    *pair(NAME, "step_of_the_host", subject(steps=3, on_host=True), FEW, quick=True),
    *pair(NAME, "beyond", subject(steps=(-3, 2**40, 2, 1, 0), beyond=True, aux=0.1), FEW),
    *pair(NAME, "classes_apart", subject(layout=every_other), FEW),
    *pair(NAME, "positions_apart", subject(layout=every_other, codes_first=True), FEW),
    *pair(NAME, "many_codes", subject(shape=(2, 5, 331), aux=0.1), FEW),
    *pair(NAME, "uniform_many_codes", subject("uniform", shape=(2, 18, 256), codes_first=True), FEW),
    *pair(NAME, "two_codes", subject(shape=(3, 40, 2), reduction="places"), FEW),
    *pair(NAME, "one_code", subject(shape=(3, 40, 1), aux=1.0, reduction="places"), FEW),
    *pair(NAME, "one_place", subject(shape=(4, 1, 65)), FEW),
    *pair(NAME, "no_places", subject(shape=(3, 0, 9), aux=0.1), FEW),
    *pair(NAME, "no_samples", subject(shape=(0, 4, 9)), FEW),
    *pair(NAME, "offset", subject(values=lambda z: z + 3000), ((FP64,), (FP32,))),
    *pair(NAME, "impossible_codes", subject(values=impossible, steps=(1, 2, 3, 4, 5), reduction="places"), ((FP64,), (FP32,))),
]
