"""Cases of add_noise and of its backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Dtypes
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.schedule.guidance import channels_last
from mmgen_kernels.battery.schedule.law import BF16, FEW, FP32, FP64, SAME, Subject, Tensors, pair

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=FP64)
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
TIMES = (0.0, 0.02, 0.35, 0.999, 1.0)
INDICES = (0, 1, 500, 999, 2**40)  # the last one is out of range


def weights(path: str, p: float, by_index: bool) -> tuple[float, float, float, float]:
    """a, s and their derivatives."""
    if path == "linear":
        return 1 - p, p, -1.0, 1.0
    if path == "edm":
        return 1.0, p, 0.0, 1.0
    if path == "gvp":
        a, s = math.cos(math.pi * p / 2), math.sin(math.pi * p / 2)
        return a, s, -math.pi / 2 * s, math.pi / 2 * a
    if by_index:
        return math.sqrt(p), math.sqrt(1 - p), math.nan, math.nan
    a = math.exp(-(19.9 * p**2 / 4 + 0.1 * p / 2))
    s = math.sqrt(-math.expm1(2 * math.log(a)))
    da = -a * (19.9 * p + 0.1) / 2
    return a, s, da, -a * da / s if s else math.inf


def subject(
    path: str,
    target: str,
    *,
    by_index: bool = False,
    shape: tuple[int, ...] = (5, 4, 37),
    key: str | None = None,
    times: tuple[float, ...] = TIMES,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    t_dtype: torch.dtype | None = None,
) -> Subject:
    B = shape[0]
    given = (INDICES if by_index else times)[:B]

    def arguments(device: torch.device, dtypes: Dtypes) -> Tensors:
        names = ("x0",) if key else ("x0", "noise")
        t = {n: layout(randn(*shape, seed=i).to(dtypes[min(i, len(dtypes) - 1)])).to(device) for i, n in enumerate(names)}
        t["t"] = torch.tensor(given, dtype=t_dtype or (torch.int64 if by_index else FP64), device=device)
        if by_index:
            t["table"] = ALPHAS_CUMPROD.to(device)
        if key:
            keys = torch.tensor([[3 + b, 2**41] for b in range(B)]) if key == "key per sample" else torch.tensor([3, 5])
            t["key"] = keys.to(device)
        return t

    def call(t: Tensors) -> tuple[Tensor, ...]:
        noise = t.get("key", t.get("noise"))
        return mk.add_noise(t["x0"], noise, t["t"], path=path, target=target, table=t.get("table"))

    def formula(t: Tensors) -> tuple[Tensor, ...]:
        x0 = t["x0"]
        z = t["z"] if key else t["noise"].to(x0.dtype)
        found = []
        for p in t["t"].tolist():
            found.append(weights(path, float(ALPHAS_CUMPROD[min(max(p, 0), 999)]) if by_index else p, by_index))
        a, s, da, ds = (torch.tensor(w, dtype=x0.dtype).reshape(-1, *[1] * (x0.dim() - 1)) for w in zip(*found, strict=True))
        targets = {"epsilon": lambda: z, "sample": lambda: x0, "v": lambda: a * z - s * x0, "flow": lambda: da * x0 + ds * z}
        return a * x0 + s * z, targets[target]()

    def normals(t: Tensors) -> Tensor:
        return mk.philox_normal(shape, t["key"], dtype=FP64 if t["x0"].dtype == FP64 else FP32)

    return Subject(arguments, call, formula, normals if key else None, ("table", *(["key"] if key == "key" else [])), key != "key")


LATER = (*TIMES[1:], 0.5)  # at 0 the derivative of vp's noise is infinite
PATHS = [
    (path, target)
    for path in ("linear", "gvp", "edm", "vp")
    for target in ("epsilon", "sample", "flow", *(["v"] if path in ("gvp", "vp") else []))
]
CASES = [
    *[c for p, g in PATHS for c in pair("add_noise", f"{p}_{g}", subject(p, g, times=LATER if p == "vp" else TIMES), FEW)],
    *[c for g in ("epsilon", "sample", "v") for c in pair("add_noise", f"index_{g}", subject("vp", g, by_index=True), FEW)],
    *pair("add_noise", "index_key", subject("vp", "v", by_index=True, key="key per sample"), SAME, quick=True),
    *pair("add_noise", "flow_key", subject("linear", "flow", key="key"), SAME, quick=True),
    *pair("add_noise", "epsilon_key", subject("linear", "epsilon", key="key"), FEW),
    *pair("add_noise", "long", subject("gvp", "flow", shape=(2, 4100)), FEW),
    *pair("add_noise", "rank_1", subject("gvp", "flow", shape=(5,)), FEW),
    *pair("add_noise", "channels_last",
          subject("linear", "flow", shape=(5, 3, 4, 6), layout=channels_last), FEW),
    *pair("add_noise", "fp32_time", subject("linear", "flow", times=(0.25, 0.5, 0.75, 0.125, 1.0), t_dtype=FP32), FEW),
    *pair("add_noise", "int32_index", subject("vp", "v", by_index=True, shape=(4, 5), t_dtype=torch.int32), FEW),
    *pair("add_noise", "mixed", subject("linear", "flow"), ((FP32, BF16), (BF16, FP32)), quick=True)[:1],
]  # fmt: skip
