"""Residual quantizers: the training step through all levels. Shapes are N x K x D x L: rows, codes, width, levels.

Codebooks shrink from level to level as the residuals of an ideal quantizer would, by 2^(-log2 K / D).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import vq_oracle
from benchmarks.bars import Bar, fastest
from benchmarks.harness import Case, Contestant
from benchmarks.peers import stock_quantizer

BETA = stock_quantizer.BETA
SHAPES = {
    "4800x1024x128x8": "EnCodec 24 kHz, 6 kbit/s",
    "4800x1024x128x32": "EnCodec 24 kHz, 24 kbit/s",
    "2376x1024x8x9": "DAC 44 kHz",
}


def quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loop that model code writes: x (N, D), codebooks (L, K, D) -> quantized (N, D), indices (N, L), loss ()."""
    residual, total, indices, losses = x, torch.zeros_like(x), [], []
    for codebook in codebooks.unbind(0):
        with torch.no_grad():
            index = torch.addmm(codebook.square().sum(-1), residual, codebook.t(), alpha=-2).argmin(dim=-1)
        chosen = F.embedding(index, codebook)
        losses.append(F.mse_loss(chosen, residual.detach()) + BETA * F.mse_loss(chosen.detach(), residual))
        residual, total = residual - chosen.detach(), total + chosen.detach()
        indices.append(index)
    return x + (total - x).detach(), torch.stack(indices, -1), torch.stack(losses).sum()


def _stock(x, codebooks, upstream):
    return stock_quantizer.step_with(quantize, x, codebooks, upstream)


def _compiled(x, codebooks, upstream):
    from benchmarks.peers.compiled import compile_static

    return stock_quantizer.step_with(compile_static(quantize, x.device), x, codebooks, upstream)


def _ours(x, codebooks, upstream):
    import mmgen_kernels as mk

    def quantizer(x, codebooks):
        out = mk.residual_quantize(x, codebooks, beta=BETA)
        return out.quantized, out.indices, out.loss.sum()

    return stock_quantizer.step_with(quantizer, x, codebooks, upstream)


CONTESTANTS = (
    Contestant("ours", _ours, requires="mmgen_kernels", exact=True),
    Contestant("stock", _stock, scratch=4.0),
    Contestant("compile", _compiled, scratch=4.5, compiles=True),
)


def judge(contestant: Contestant, given: tuple, output) -> dict:
    """Indices against the fp64 definition on the residuals that the contestant's own choices leave in fp32; the rest against an
    fp64 run along them."""
    (x, codebooks, upstream), (indices, *results) = given, output
    residual, wrong = x, 0
    for level, codebook in enumerate(codebooks):
        wrong += vq_oracle.count_wrong(indices[:, level], vq_oracle.nearest(residual, codebook))["wrong"]
        residual = residual - codebook[indices[:, level]]
    truth = training_step(x, codebooks, indices, upstream)
    error = max(vq_oracle.relative_error(got, true) for got, true in zip(results, truth, strict=True))
    rows = indices.numel()
    return {"rows": rows, "wrong": wrong, "wrong_percent": round(100 * wrong / rows, 4), "error": error}


def training_step(x: Tensor, codebooks: Tensor, indices: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dcodebooks) in fp64 of (upstream * quantized).sum() + the sum of the losses."""
    residual, loss, dx = x.double(), torch.zeros((), dtype=torch.float64, device=x.device), upstream.double()
    dcodebooks = torch.zeros_like(codebooks, dtype=torch.float64)
    slope = 2.0 / x.numel()
    for level, codebook in enumerate(codebooks.double()):
        residual = residual - codebook[indices[:, level]]
        loss += (1 + BETA) * residual.square().mean()
        dx = dx + BETA * slope * residual
        dcodebooks[level].index_add_(0, indices[:, level], -slope * residual)
    return loss, dx, dcodebooks


def data(dims: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    n, k, d, levels = (dims[name] for name in "NKDL")
    generator = torch.Generator().manual_seed(0)
    x, codebooks = torch.randn(n, d, generator=generator), torch.randn(levels, k, d, generator=generator)
    shrink = 2.0 ** (-math.log2(k) / d)
    codebooks *= (shrink ** torch.arange(levels)).view(-1, 1, 1)
    # as large as the loss's own gradient, so that the error of neither hides in the other
    return x, codebooks, torch.randn(n, d, generator=generator) / x.numel()


def case(shape: str, device: torch.device, note: str = "") -> Case:
    dims = dict(zip("NKDL", map(int, shape.split("x")), strict=True))
    n, k, d, levels = dims.values()

    def inputs(tiny: bool) -> dict[str, tuple]:
        size = {**dims, "N": min(n, 64), "K": min(k, 128)} if tiny else dims
        return {"data": tuple(t.to(device) for t in data(size))}

    return Case(
        name=f"residual/{shape}",
        group="residual",
        contestants=CONTESTANTS,
        inputs=inputs,
        judge=judge,
        flops=2.0 * levels * n * k * d,
        bytes=float(4 * (4 * n * d + 2 * levels * k * d) + 8 * n * levels),  # x, upstream, quantized, dx; codebooks and gradient
        limit="fma_gflops",
        scratch_units=float(n * k),
        dims=dims,
        tolerance=1e-4,  # fp32 sums of some thousand terms; a wrong formula is off by far more
        note=note,
    )


def residual_cases(device: torch.device) -> list[Case]:
    return [case(shape, device, note) for shape, note in SHAPES.items()]


def residual_bars(results: dict[str, dict]) -> list[Bar]:
    return [fastest(results, f"residual/{shape}", "ours", ("stock", "compile")) for shape in SHAPES]
