"""The drop-in: vector-quantize-pytorch's modules as they are and after `mk.patch`, in a training step with their defaults (EMA,
rotation trick). Shapes are N x K x D, and x L for ResidualVQ of L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import vq_oracle
from benchmarks.bars import Bar, below, faster
from benchmarks.harness import Case, Contestant

PACKAGE = "vector_quantize_pytorch"
# shape -> (what it is, how many times as fast as stock, share of stock's memory)
SHAPES: dict[str, tuple[str, float, float | None]] = {
    "4096x16384x8": ("VectorQuantize, LlamaGen's size", 30.0, 1 / 20),
    "4800x1024x128x8": ("ResidualVQ, 8 levels, EnCodec's size", 4.0, None),
}


def _module(codebooks: Tensor) -> torch.nn.Module:
    """codebooks (L, K, D); one level is a VectorQuantize."""
    from vector_quantize_pytorch import ResidualVQ, VectorQuantize

    levels, num_codes, dim = codebooks.shape
    if levels == 1:
        module = VectorQuantize(dim=dim, codebook_size=num_codes)
        layers = [module]
    else:
        module = ResidualVQ(dim=dim, codebook_size=num_codes, num_quantizers=levels)
        layers = list(module.layers)
    for layer, codes in zip(layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(codes[None])
        layer._codebook.embed_avg.data.copy_(codes[None])
    return module.to(codebooks.device).train()


def _step(module: torch.nn.Module, x: Tensor):
    """The call that is timed: (codebooks before the step, indices (N, L), quantized, loss, dx)."""
    tokens = x[None].detach().requires_grad_()

    def step():
        before = torch.stack([layer._codebook.embed[0] for layer in getattr(module, "layers", [module])])
        quantized, indices, loss = module(tokens)
        (dx,) = torch.autograd.grad(quantized.square().sum() + loss.sum(), tokens)
        return before, indices[0].view(len(x), -1), quantized[0].detach(), loss.detach().sum(), dx[0]

    return step


def _stock(x, codebooks):
    return _step(_module(codebooks), x)


def _patched(x, codebooks):
    import mmgen_kernels as mk

    module = _module(codebooks)
    mk.patch(module, strict=True)
    return _step(module, x)


CONTESTANTS = (
    Contestant("patched", _patched, requires=PACKAGE, exact=True),
    Contestant("stock", _stock, requires=PACKAGE, scratch=24.5),
)


def judge(contestant: Contestant, given: tuple, output) -> dict:
    """Indices against the fp64 definition, with the codebooks that the step began with; the sum of the codes and the loss against
    fp64 along them."""
    (x, _), (codebooks, indices, quantized, loss, _) = given, output
    residual, total, wrong, mean = x, torch.zeros_like(x, dtype=torch.float64), 0, 0.0
    for level, codebook in enumerate(codebooks):
        wrong += vq_oracle.count_wrong(indices[:, level], vq_oracle.nearest(residual, codebook))["wrong"]
        codes = codebook[indices[:, level]]
        mean += float((residual.double() - codes.double()).square().mean())
        residual, total = residual - codes, total + codes.double()
    error = max(vq_oracle.relative_error(quantized, total), abs(float(loss) - mean) / mean)
    rows = indices.numel()
    return {"rows": rows, "wrong": wrong, "wrong_percent": round(100 * wrong / rows, 4), "error": error}


def case(shape: str, device: torch.device) -> Case:
    n, k, d, levels = (*map(int, shape.split("x")), 1)[:4]

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        rows, codes = (min(n, 64), min(k, 128)) if tiny else (n, k)
        shrink = 0.9 ** torch.arange(levels).view(-1, 1, 1)  # as residuals do from level to level
        x, codebooks = torch.randn(rows, d, generator=generator), shrink * torch.randn(levels, codes, d, generator=generator)
        return {"data": (x.to(device), codebooks.to(device))}

    return Case(
        name=f"drop-in/{shape}",
        group="drop-in",
        contestants=CONTESTANTS,
        inputs=inputs,
        judge=judge,
        flops=2.0 * levels * n * k * d,
        bytes=float(4 * (3 * n * d + 3 * levels * k * d) + 8 * n * levels),  # x, quantized, dx; codes and their averages
        limit="fma_gflops",
        scratch_units=float(n * k),
        dims={"N": n, "K": k, "D": d, "L": levels},
        tolerance=1e-4,
        note=SHAPES[shape][0],
    )


def dropin_cases(device: torch.device) -> list[Case]:
    return [case(shape, device) for shape in SHAPES]


def dropin_bars(results: dict[str, dict]) -> list[Bar]:
    bars = []
    for shape, (_, times, share) in SHAPES.items():
        name = f"drop-in/{shape}"
        bars.append(faster(results, name, "patched", "stock", times))
        if share is not None:
            bars.append(below(f"{name}: memory of patched over that of stock", _memory_share(results, name), share))
    return bars


def _memory_share(results: dict[str, dict], name: str) -> float | None:
    contestants = results.get(name, {}).get("contestants", {})
    ours, stock = (contestants.get(who, {}).get("extra_bytes") for who in ("patched", "stock"))
    return None if ours is None or stock is None else ours / stock
