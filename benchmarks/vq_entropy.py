"""code_entropy in the training step of a tokenizer: both entropies and their gradients, against the dense computation.

Shapes are N x K x D: rows, codes, width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import Bar, below, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers import stock_entropy

# shape -> (options, what it is)
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "1024x65536x64": ({"metric": "l2", "temperature": 10.0, "eps": 1e-5}, "LFQ-sized codebook"),
    "1024x262144x256": ({"metric": "dot", "temperature": 0.01, "eps": 1e-5}, "IBQ, 4 images"),
}
ORACLE_SCORES = 2**28  # above this many scores the oracle judges the entropies of some rows and dx of them only
ORACLE_CHUNK = 2**24  # fp64 scores at a time
MEMORY_SHARE = 1 / 50  # of what the dense computation needs
# Relative to fp64. Cold scores reach 200 and their rounding is that of fp32 inputs' products: 200 * 2^-24 * sqrt(D) / 2.
TOLERANCE = 1e-3


def _ours(**options) -> Contestant:
    def make(x, codebook):
        import mmgen_kernels as mk

        def entropies(a, b):
            out = mk.code_entropy(a, b, **options)
            return out.sample_entropy.mean(), out.mean_entropy

        return stock_entropy.step_with(entropies, x, codebook)

    return Contestant("ours", make, requires="mmgen_kernels")


def _scores(x: Tensor, codes: Tensor, metric: str, temperature: float) -> Tensor:
    scores = x @ codes.t()
    if metric == "l2":
        scores = 2 * scores - codes.square().sum(1)  # less |x|^2, which softmax does not see
    return scores / temperature


def truth(x: Tensor, codebook: Tensor, metric: str, temperature: float, eps: float) -> dict[str, Tensor]:
    """In fp64, a few rows at a time: sample, mean, and dx of all rows or of every n-th."""
    x, codes = x.double(), codebook.double()
    n, k = len(x), len(codes)
    parts = x.split(max(1, ORACLE_CHUNK // k))
    q, sample = torch.zeros(k, dtype=torch.float64, device=x.device), torch.zeros((), dtype=torch.float64, device=x.device)
    for part in parts:
        log_p = _scores(part, codes, metric, temperature).log_softmax(-1)
        p = log_p.exp()
        q += p.sum(0) / n
        sample -= (p * log_p).sum() / n
    # of -mean_entropy by a row's probability of a code: what is left of the loss is a sum over rows
    weights = ((q + eps).log() + q / (q + eps)) / n
    stride = max(1, n * k // ORACLE_SCORES)
    found = []
    for part in x[::stride].split(max(1, ORACLE_CHUNK // k)):
        rows = part.detach().requires_grad_()
        log_p = _scores(rows, codes, metric, temperature).log_softmax(-1)
        p = log_p.exp()
        found.append(torch.autograd.grad(-(p * log_p).sum() / n + (p * weights).sum(), rows)[0])
    return {"sample": sample, "mean": -(q * (q + eps).log()).sum(), "dx": torch.cat(found), "stride": torch.tensor(stride)}


def _relative_error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp(min=1e-300))


def entropy_case(shape: str, device: torch.device) -> Case:
    options, note = SHAPES[shape]
    n, k, d = (int(size) for size in shape.split("x"))
    truths: dict[str, Tensor] = {}

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((min(n, 64), d), (min(k, 128), d)) if tiny else ((n, d), (k, d))
        return {"data": tuple(torch.randn(size, generator=generator).to(device) for size in sizes)}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if not truths:
            truths.update(truth(*given, **options))
        sample, mean, dx, _ = output
        got = {"sample": sample, "mean": mean, "dx": dx[:: int(truths["stride"])]}
        return {"error": max(_relative_error(value, truths[name]) for name, value in got.items())}

    return Case(
        name=f"entropy/{shape}",
        group="entropy",
        contestants=[make(**options) for make in (_ours, stock_entropy.stock, stock_entropy.compiled)],
        inputs=inputs,
        judge=judge,
        flops=6.0 * n * k * d,  # scores, and either gradient from them
        bytes=8.0 * (n + k) * d,
        limit="fma_gflops",
        scratch_units=float(n * k),
        dims={"N": n, "K": k, "D": d, "H": 1},
        tolerance=TOLERANCE,
        note=note,
    )


def entropy_cases(device: torch.device) -> list[Case]:
    return [entropy_case(shape, device) for shape in SHAPES]


def entropy_bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises: not slower than either dense computation, in a fiftieth of the memory."""
    names = [f"entropy/{shape}" for shape in SHAPES]
    return [
        *(faster(results, name, "ours", rival, 1.0) for name in names for rival in ("stock", "compile")),
        below(f"{names[0]}: memory of ours over that of stock", _memory_share(results, names[0], False), MEMORY_SHARE),
        *(below(f"{n}: that, less the gradients that both return", _memory_share(results, n, True), MEMORY_SHARE) for n in names),
    ]


def _memory_share(results: dict[str, dict], name: str, less_gradients: bool) -> float | None:
    record = results.get(name, {})
    ours, stock = (record.get("contestants", {}).get(who, {}).get("extra_bytes") for who in ("ours", "stock"))
    if ours is None or stock is None:
        return None
    returned = 4 * (record["dims"]["N"] + record["dims"]["K"]) * record["dims"]["D"] if less_gradients else 0
    return (ours - returned) / (stock - returned)
