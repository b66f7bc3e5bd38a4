"""Cases of scheduler_step and of its backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Dtypes
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.schedule.guidance import channels_last, guided_formula
from mmgen_kernels.battery.schedule.law import BF16, FEW, FP32, FP64, SAME, Subject, Tensors, pair

STEPS = 5


@dataclasses.dataclass(frozen=True)
class Step:
    """A call: its sizes, and what is folded into it."""

    shape: tuple[int, ...] = (3, 4, 37)
    inputs: int = 2
    outputs: int = 2
    rows: Tensor | None = None  # (1 + outputs, inputs + 2); random if None
    step: int | tuple[int, ...] = 2
    on_device: bool = False  # step and coefficients
    noise: str | None = None  # tensor, key, key per sample
    clamp: float | None = None
    threshold: tuple[float, float] | None = None
    variance: bool = False
    guidance: tuple[float, float] | None = None
    layout: Callable[[Tensor], Tensor] = lambda t: t
    values: Callable[[Tensors], Tensors] = lambda t: t

    def but(self, **changed) -> Step:
        return dataclasses.replace(self, **changed)

    def arguments(self, device: torch.device, dtypes: Dtypes) -> Tensors:
        names = [f"u{i}" for i in range(self.inputs)]
        names += [n for n, given in (("uncond", self.guidance), ("variance", self.variance)) if given]
        names += ["noise"] if self.noise == "tensor" else []
        t = {n: randn(*self.shape, seed=i) for i, n in enumerate(names)}
        if self.variance:
            t["variance"] = t["variance"].tanh()
        t = {n: self.layout(v.to(dtypes[i % len(dtypes)])).to(device) for i, (n, v) in enumerate(self.values(t).items())}
        rows = randn(STEPS, 1 + self.outputs, self.inputs + 2, seed=70) if self.rows is None else self.rows.expand(STEPS, -1, -1)
        if self.variance:
            limits = torch.zeros(STEPS, 1, self.inputs + 2, dtype=FP64)
            limits[..., 0], limits[..., 1] = -6.0, -0.5
            rows = torch.cat((rows, limits), 1)
        t["coefficients"] = rows.to(device if self.on_device else "cpu")
        if self.on_device or not isinstance(self.step, int):
            t["step"] = torch.tensor(self.step, device=device)
        if self.noise in ("key", "key per sample"):
            keys = torch.tensor([[12345 + b, 2**40 - b] for b in range(max(self.shape[0], 1))])[: self.shape[0]]
            key = keys if self.noise == "key per sample" else torch.tensor([7, 2**33])
            t["key"] = key.to(device)
        return t

    def call(self, t: Tensors) -> tuple[Tensor, ...]:
        scale, rescale = self.guidance or (1.0, 0.0)
        return mk.scheduler_step(
            [t[f"u{i}"] for i in range(self.inputs)], t["coefficients"], t.get("step", self.step),  # type: ignore[arg-type]
            noise=t.get("key", t.get("noise")), clamp=self.clamp, threshold=self.threshold, variance=t.get("variance"),
            uncond=t.get("uncond"), guided=self.inputs - 1, guidance_scale=scale, guidance_rescale=rescale,
        )  # fmt: skip

    def formula(self, t: Tensors) -> tuple[Tensor, ...]:
        inputs = [t[f"u{i}"] for i in range(self.inputs)]
        first = inputs[0]
        if "uncond" in t:
            inputs[-1] = guided_formula(inputs[-1], t["uncond"], *(self.guidance or (1.0, 0.0)))
        z = t.get("z", t.get("noise"))
        row = t["coefficients"].cpu()[self.indices()]  # (R, C) or (B, R, C)

        def total(k: int, terms: list[Tensor | None]) -> Tensor:
            out = torch.zeros_like(first)
            for j, term in enumerate(terms):
                factor = row[..., k, j]
                if term is not None and bool((factor != 0).any()):
                    shaped = factor.reshape(-1, *[1] * (first.dim() - 1)) if factor.dim() else factor
                    out = out + (shaped.to(first.dtype) * term).to(first.dtype)
            return out

        if self.variance and z is not None:
            low, high = row[..., -1, 0].item(), row[..., -1, 1].item()
            share = (t["variance"] + 1) / 2
            z = z * torch.exp((share * high + (1 - share) * low) / 2)
        d = total(0, [*inputs, None, z])
        if self.clamp is not None:
            d = d.clamp(-self.clamp, self.clamp)
        if self.threshold is not None and d.numel():
            wide = d if d.dtype == FP64 else d.float()
            bound = torch.quantile(wide.abs().flatten(1), self.threshold[0], dim=1).clamp(1, self.threshold[1])
            bound = bound.reshape(-1, *[1] * (d.dim() - 1)).to(d.dtype)
            d = d.clamp(-bound, bound) / bound
        return tuple(total(1 + k, [*inputs, d, z]) for k in range(self.outputs))

    def normals(self, t: Tensors) -> Tensor:
        folded = mk.fold_in(t["key"], self.indices().to(t["key"].device).expand(t["key"].shape[:-1]))
        return mk.philox_normal(self.shape, folded, dtype=FP64 if t["u0"].dtype == FP64 else FP32)

    def indices(self) -> Tensor:
        return torch.tensor(self.step).clamp(0, STEPS - 1)

    def subject(self) -> Subject:
        shared = ("coefficients", *(["step"] if isinstance(self.step, int) else []))
        normals = self.normals if self.noise in ("key", "key per sample") else None
        return Subject(self.arguments, self.call, self.formula, normals, shared, self.noise != "key")


def nan_where_unused(t: Tensors) -> Tensors:
    """In what the rows of UNUSED multiply by 0."""
    return t | {"u1": torch.full_like(t["u1"], torch.nan)}


def spoiled(value: float) -> Callable[[Tensors], Tensors]:
    def change(t: Tensors) -> Tensors:
        t = {n: v.clone() for n, v in t.items()}
        t["u0"].view(-1)[5] = t["u1"].view(-1)[50] = value
        return t

    return change


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=FP64)


PLAIN = Step()
UNUSED = rows((0.5, 0, 0, 0, 0), (0.3, 0, -1.2, 2, 0), (0, 0, 0, 1, 0))
NOTHING = torch.zeros(3, 4, dtype=FP64)
ONLY_NOISE = rows((0, 0, 0, 0), (0, 0, 0, 0.7), (0, 0, 0, 0))
DDIM = rows((1.4, -0.9, 0, 0), (0.35, 0.2, 0.6, 0), (0, 0, 1, 0))
NOISES = ("tensor", "key", "key per sample")
# Around a vector, several of them, a chunk, and a Philox block.
SIZES = ((1, 1), (2, 3), (3, 15), (2, 64), (3, 65), (2, 1023), (1, 1024), (2, 1027), (3, 4100))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "half_of_channels": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "half_of_batch": lambda t: torch.cat((t, t))[: len(t)],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "reversed_axes": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
}
MIXED = ((FP32, BF16), (BF16, FP32), (FP64, FP32))


def cases_of(name: str, step: Step, dtypes: tuple[Dtypes, ...], *, quick: bool = False) -> list:
    return pair("scheduler_step", name, step.subject(), dtypes, quick=quick, differentiated=step.threshold is None)


CASES = [
    *cases_of("ddim", PLAIN.but(shape=(2, 4, 16, 16), rows=DDIM), SAME, quick=True),
    *cases_of("ddim_clamp", PLAIN.but(shape=(2, 4, 16, 16), rows=DDIM, clamp=1.0), SAME, quick=True),
    *[c for n in range(1, 6) for m in (1, 2, 3) for c in cases_of(f"{n}_in_{m}_out", PLAIN.but(inputs=n, outputs=m), FEW)],
    *[c for s in SIZES for c in cases_of("size_" + "x".join(map(str, s)), PLAIN.but(shape=s, noise="key"), FEW)],
    *[c for s in ((0, 4), (3, 0)) for c in cases_of("size_" + "x".join(map(str, s)), PLAIN.but(shape=s), FEW)],
    *cases_of("rank_1", PLAIN.but(shape=(37,)), FEW),
    *[c for z in NOISES for c in cases_of(z.replace(" ", "_"), PLAIN.but(noise=z), SAME, quick=z == "key")],
    *[c for z in NOISES for c in cases_of(f"clamp_{z}".replace(" ", "_"), PLAIN.but(noise=z, clamp=0.8, inputs=3), FEW)],
    *[c for z in NOISES for c in cases_of(f"variance_{z}".replace(" ", "_"), PLAIN.but(noise=z, variance=True), FEW)],
    *cases_of("variance", PLAIN.but(noise="key per sample", variance=True, clamp=1.0), SAME, quick=True),
    *[c for z in NOISES for c in cases_of(f"threshold_variance_{z}".replace(" ", "_"),
      PLAIN.but(noise=z, variance=True, threshold=(0.8, 4.0)), FEW)],
    *cases_of("threshold", PLAIN.but(threshold=(0.9, 1.6)), SAME, quick=True),
    *[c for r in (0.0, 0.5, 1.0) for c in cases_of(f"threshold_{r}", PLAIN.but(threshold=(r, 9.0), noise="tensor"), FEW)],
    *cases_of("guidance", PLAIN.but(guidance=(7.5, 0.0)), SAME, quick=True),
    *cases_of("guidance_rescale", PLAIN.but(guidance=(4.0, 0.7), inputs=3, noise="tensor"), SAME, quick=True),
    *cases_of("guidance_clamp_key", PLAIN.but(guidance=(3.0, 0.0), inputs=5, outputs=3, noise="key", clamp=1.0), FEW),
    *cases_of("guidance_threshold", PLAIN.but(guidance=(3.0, 0.3), inputs=2, threshold=(0.95, 3.0)), FEW),
    *cases_of("step_on_device", PLAIN.but(step=1, on_device=True, noise="key"), FEW, quick=True),
    *cases_of("step_per_sample", PLAIN.but(step=(4, 0, 2), on_device=True, noise="key per sample"), FEW, quick=True),
    *cases_of("step_out_of_range", PLAIN.but(step=(-3, 7, 2), on_device=True), FEW),
    *cases_of("unused_input_is_nan", PLAIN.but(inputs=3, rows=UNUSED, values=nan_where_unused), FEW, quick=True)[:1],
    *cases_of("nothing", PLAIN.but(rows=NOTHING), FEW)[:1],
    *cases_of("only_noise", PLAIN.but(rows=ONLY_NOISE, noise="key"), FEW)[:1],
    *[c for n, change in LAYOUTS.items() for c in cases_of(n, PLAIN.but(shape=(3, 4, 5, 6), layout=change), FEW)],
    *[c for n in ("half_of_channels", "half_of_batch") for c in
      cases_of(f"{n}_key", PLAIN.but(shape=(3, 4, 5, 6), layout=LAYOUTS[n], noise="key"), FEW)],
    *[c for v in ("nan", "inf") for c in cases_of(v, PLAIN.but(values=spoiled(float(v)), clamp=1.0), FEW)[:1]],
    *cases_of("mixed", PLAIN, MIXED, quick=True)[:1],
    *cases_of("mixed_noise", PLAIN.but(noise="tensor", clamp=1.0), MIXED)[:1],
]  # fmt: skip
