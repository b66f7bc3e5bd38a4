"""Cases of hybrid_loss and of its backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import mmgen_kernels as mk
from mmgen_kernels.battery import Dtypes
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.schedule.guidance import channels_last
from mmgen_kernels.battery.schedule.law import BF16, FEW, FP16, FP32, FP64, SAME, Subject, Tensors, pair

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=FP64)
TIMES = (0, 1, 500, 999, 2**40)  # the last one is out of range


class Process:
    """The Gaussian process of the betas, each number (B, 1, ...) of its sample's step, as the papers write it."""

    def __init__(self, t: Tensor, dims: int, dtype: torch.dtype):
        after = (1 - BETAS).cumprod(0)
        before = torch.cat((torch.ones(1, dtype=FP64), after[:-1]))
        spread = BETAS * (1 - before) / (1 - after)
        numbers = {
            "beta": BETAS,
            "log_beta": BETAS.log(),
            "log_spread": torch.cat((spread[1:2], spread[1:])).log(),
            "data": after.sqrt(),
            "noise": (1 - after).sqrt(),
            "of_data": BETAS * before.sqrt() / (1 - after),
            "of_x_t": (1 - before) * (1 - BETAS).sqrt() / (1 - after),
        }
        at = t.cpu().clamp(0, len(BETAS) - 1)
        self.first = (at == 0).reshape(-1, *[1] * (dims - 1))
        self.numbers = {n: v[at].to(dtype).reshape(self.first.shape) for n, v in numbers.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.numbers[name]


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def level_log_probability(x0: Tensor, centred: Tensor, log_variance: Tensor) -> Tensor:
    """log P of the level of 8-bit data that x0 is; in fp64 by logarithms, which have no tail where nothing is left of a CDF."""
    inverse = torch.exp(-0.5 * log_variance)
    upper, lower = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)
    if x0.dtype == FP64:
        b, a = (2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3) for u in (upper, lower))
        below, above, between = logsigmoid(b), logsigmoid(-a), torch.log(-torch.expm1(a - b))
        inner = below + above + between
        return torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, above, inner)).clamp(min=math.log(1e-12))
    below, not_above = normal_cdf(upper), normal_cdf(lower)
    inner = torch.log((below - not_above).clamp(min=1e-12))
    above = torch.log((1 - not_above).clamp(min=1e-12))
    return torch.where(x0 < -0.999, torch.log(below.clamp(min=1e-12)), torch.where(x0 > 0.999, above, inner))


def apart(p: Process, prediction: str, x0: Tensor, noise: Tensor, output: Tensor, clamp: float | None) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x0) less the model's. In fp64 as it is where x_t is left out, which then cancels nowhere."""
    x_t = p["data"] * x0 + p["noise"] * noise
    if prediction == "previous":
        return p["of_data"] * x0 + p["of_x_t"] * x_t - output
    if x0.dtype == FP64 and clamp is None:
        return p["of_data"] * {
            "epsilon": lambda: p["noise"] / p["data"] * (output - noise),
            "sample": lambda: x0 - output,
            "v": lambda: p["noise"] * (output - (p["data"] * noise - p["noise"] * x0)),
        }[prediction]()
    predicted = {
        "epsilon": lambda: (x_t - p["noise"] * output) / p["data"],
        "sample": lambda: output,
        "v": lambda: p["data"] * x_t - p["noise"] * output,
    }[prediction]()
    if clamp is not None:
        predicted = predicted.clamp(-clamp, clamp)
    return (p["of_data"] * x0 + p["of_x_t"] * x_t) - (p["of_data"] * predicted + p["of_x_t"] * x_t)


def losses(
    t: Tensors, prediction: str, variance: str, objective: str, vb_weight: float, clamp: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    x0, noise = t["x0"], t["noise"]
    p, C = Process(t["t"], x0.dim(), x0.dtype), x0.shape[1]
    output, v = t["output"][:, :C], t["output"][:, C:]
    target = {
        "epsilon": noise,
        "sample": x0,
        "v": p["data"] * noise - p["noise"] * x0,
        "previous": p["of_data"] * x0 + p["of_x_t"] * (p["data"] * x0 + p["noise"] * noise),
    }[prediction]
    log_variance = {
        "learned_range": lambda: (v + 1) / 2 * p["log_beta"] + (1 - (v + 1) / 2) * p["log_spread"],
        "learned": lambda: v,
        "fixed_small": lambda: p["log_spread"].expand_as(x0),
        "fixed_large": lambda: torch.where(p.first, p["log_spread"], p["log_beta"]).expand_as(x0),
    }[variance]()
    between = apart(p, prediction, x0, noise, output if objective == "kl" else output.detach(), clamp)
    gap = log_variance - p["log_spread"]
    kl = 0.5 * (-1 + gap + torch.exp(-gap) + between**2 * torch.exp(-log_variance))
    term = torch.where(p.first, -level_log_probability(x0, between, log_variance), kl)
    mse = (target - output).square().flatten(1).mean(1)
    vb = term.flatten(1).mean(1) / math.log(2) * vb_weight
    return (vb if objective == "kl" else mse + vb), mse, vb


def subject(
    prediction: str = "epsilon",
    variance: str = "learned_range",
    *,
    shape: tuple[int, ...] = (5, 3, 8, 7),
    objective: str = "hybrid",
    vb_weight: float = 1.0,
    clamp: float | None = None,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    times: tuple[int, ...] = TIMES,
    scale: float = 1.0,
    t_dtype: torch.dtype = torch.int64,
) -> Subject:
    """`scale` is of what the prediction is off by."""
    B = shape[0]
    learned = variance.startswith("learned")

    def arguments(device: torch.device, dtypes: Dtypes) -> Tensors:
        x0 = ((randn(*shape, seed=1) * 100 + 128).clamp(0, 255).round() / 127.5 - 1).to(dtypes[-1])
        noise = randn(*shape, seed=2).to(dtypes[-1])
        t = torch.tensor(times[:B], dtype=t_dtype)
        p = Process(t, len(shape), FP64)
        wide, z = x0.double(), noise.double()
        target = {
            "epsilon": z,
            "sample": wide,
            "v": p["data"] * z - p["noise"] * wide,
            "previous": p["of_data"] * wide + p["of_x_t"] * (p["data"] * wide + p["noise"] * z),
        }[prediction]
        output = target + randn(*shape, seed=3) * scale
        if learned:
            v = randn(*shape, seed=4)
            if variance == "learned":
                v = p["log_spread"] + v
            output = torch.cat((output, v), 1)
        tensors = {"output": layout(output.to(dtypes[0])), "x0": layout(x0), "noise": layout(noise), "t": t}
        tensors["table"] = mk.hybrid_table(BETAS, prediction=prediction, variance=variance)
        return {n: v.to(device) for n, v in tensors.items()}

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return mk.hybrid_loss(
            t["output"], t["x0"], t["noise"], t["t"], table=t["table"], vb_weight=vb_weight, objective=objective, clamp=clamp
        )

    def formula(t: Tensors) -> tuple[Tensor, ...]:
        return losses(t, prediction, variance, objective, vb_weight, clamp)

    return Subject(arguments, call, formula, shared=("table",), constant=("x0", "noise"))


PREDICTIONS = {"sample": 0.1, "v": 0.3, "previous": 0.02}  # the errors that leave the bound in its range
RANGE = tuple(d for d in SAME if d != (FP16,))  # the inverse of a variance overflows in fp16 as the formula is written
CASES = [
    *pair("hybrid_loss", "epsilon", subject(), SAME, quick=True),
    *[c for p, s in PREDICTIONS.items() for c in pair("hybrid_loss", p, subject(p, scale=s), FEW)],
    *pair("hybrid_loss", "kl", subject(objective="kl", vb_weight=1000), RANGE, quick=True),
    *[c for p, s in PREDICTIONS.items() for c in pair("hybrid_loss", f"kl_{p}", subject(p, scale=s, objective="kl"), FEW)],
    *pair("hybrid_loss", "learned", subject(variance="learned", objective="kl"), FEW),
    *pair("hybrid_loss", "fixed_small", subject(variance="fixed_small", objective="kl"), FEW, quick=True),
    *pair("hybrid_loss", "fixed_large", subject(variance="fixed_large", objective="kl"), FEW),
    *pair("hybrid_loss", "clamp", subject("sample", scale=0.3, objective="kl", clamp=1.0), FEW, quick=True),
    *pair("hybrid_loss", "clamp_epsilon", subject(objective="kl", clamp=1.0), FEW),
    *pair("hybrid_loss", "clamp_hybrid", subject("sample", scale=0.3, clamp=0.5), FEW),
    *pair("hybrid_loss", "tails", subject(objective="kl", times=(0,) * 5, scale=6.0), FEW),
    *pair("hybrid_loss", "far_tails", subject(objective="kl", times=(0,) * 5, scale=1e4), FEW),
    *pair("hybrid_loss", "long", subject(shape=(2, 2, 2100), times=(0, 3)), FEW),
    *pair("hybrid_loss", "weight", subject(vb_weight=0.001), FEW),
    *pair("hybrid_loss", "rank_2", subject(shape=(5, 3)), FEW),
    *pair("hybrid_loss", "channels_last", subject(layout=channels_last), FEW),
    *pair("hybrid_loss", "rows_apart", subject(layout=lambda t: torch.stack((t, t), 1)[:, 1]), FEW),
    *pair("hybrid_loss", "int32_t", subject(t_dtype=torch.int32, times=(0, 1, 500, 999, 2000)), FEW),
    *pair("hybrid_loss", "no_samples", subject(shape=(0, 3, 4)), FEW),
    *pair("hybrid_loss", "mixed", subject(), ((BF16, FP32), (FP32, BF16), (FP32, FP64))),
]
