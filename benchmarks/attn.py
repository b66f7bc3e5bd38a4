"""Self-attention of Diffusion Transformers, forward alone and with the backward.

Shapes are B x T x H x D: samples, tokens, heads, channels of a head. The bar is torch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bars import Bar, believed_ms, below, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers.compiled import compile_static

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of what is furthest off
PEAKS = {"fp32": "fma_gflops", "bf16": "bf16_gflops"}
QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # what a call allocates must not cost what glibc did with the last
QUICK = ("forward/3x256x16x72-bf16", "step/3x256x16x72-bf16")
QUICK_CUDA = ("forward/32x256x16x72-bf16", "forward/8x1024x16x72-bf16", "step/32x256x16x72-bf16")
PRODUCTS = {"forward": 2, "step": 2 + 5}  # of T x T x D multiply-adds for each head; the backward computes the logits again
SHAPES = {
    "3x256x16x72": "DiT-XL/2, 256 px",
    "3x257x16x72": "DiT-XL/2, 256 px, and a class token",
    "1x1024x16x72": "DiT-XL/2, 512 px",
    "1x4096x8x64": "1024 px",
    "1x16x16x64": "what a call costs",
}
# Which way of loading tiles is best, a GPU tells that has more than one block for each place.
CUDA_SHAPES = {
    "32x256x16x72": "DiT-XL/2, 256 px, a batch of 32",
    "8x1024x16x72": "DiT-XL/2, 512 px, a batch of 8",
    "1x4608x24x128": "FLUX.1, 1024 px",
}


# -- attention as model code writes it --------------------------------------------------------------------------------
# q, k and v are (B, T, H, D), as views of a projection are; so is the result.


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    return ((q.shape[-1] ** -0.5 * q @ k.mT).softmax(-1) @ v).transpose(1, 2)


def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import mmgen_kernels as mk

    return mk.attention(q, k, v)


def timed(attend: Callable[..., Tensor], step: bool, compiled: bool = False) -> Callable[..., Callable]:
    """`make` of a contestant: the result, or with the backward the result and the gradients of q, k and v."""

    def make(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> Callable:
        run = compile_static(attend, q.device) if compiled else attend
        if not step:
            return torch.no_grad()(lambda: (run(q, k, v),))
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]

        def both():
            out = run(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, upstream)

        return both

    return make


def on_triton(way: str, make: Callable[..., Callable]) -> Callable[..., Callable]:
    """`make` by the Triton kernels, whose forward loads its tiles as MMGEN_KERNELS_TRITON_ATTENTION=way would have it."""

    def scoped(*given: Tensor) -> Callable:
        import mmgen_kernels as mk
        from mmgen_kernels import backends

        call = make(*given)

        def run():
            before, backends.triton_attention = backends.triton_attention, way
            try:
                with mk.use_backend("triton", family="attn"):
                    return call()
            finally:
                backends.triton_attention = before

        return run

    return scoped


def contestants(step: bool) -> list[Contestant]:
    """With the backward the ways of the forward make no difference worth a row."""
    ways = ("descriptors",) if step else ("descriptors", "pointers", "warp_specialized")
    return [
        Contestant("ours", timed(ours, step), requires="mmgen_kernels"),
        *(Contestant(f"triton-{way}", on_triton(way, timed(ours, step)), requires="triton", devices=("cuda",)) for way in ways),
        Contestant("SDPA", timed(stock, step)),
        Contestant("compiled SDPA", timed(stock, step, compiled=True), compiles=True),
        Contestant("formula", timed(formula, step), scratch=20.0 if step else 12.0),
    ]


# -- cases ------------------------------------------------------------------------------------------------------------


def exact(given: tuple[Tensor, ...], step: bool) -> list[Tensor]:
    """In fp64 on the CPU, head by head: of 4096 tokens all matrices of logits together would take gigabytes."""
    q, k, v, upstream = (t.double().cpu() for t in given)
    whole = [torch.empty_like(q) for _ in range(4 if step else 1)]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            own = (slice(b, b + 1), slice(None), slice(h, h + 1))
            results = timed(formula, step)(q[own], k[own], v[own], upstream[own])()
            for result, to in zip(results, whole, strict=True):
                to[own] = result
    return whole


def relative_error(got: Tensor, true: Tensor) -> float:
    return float((got.double().cpu() - true).square().mean().sqrt() / true.square().mean().sqrt())


def attention_case(group: str, shape: str, dtype: str, device: torch.device) -> Case:
    B, T, H, D = (int(size) for size in shape.split("x"))
    step, truth = group == "step", []

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        t = min(T, 16) if tiny else T
        projection = torch.randn(B, t, 3, H, D, generator=generator).to(device, DTYPES[dtype])
        upstream = torch.randn(B, t, H, D, generator=generator).to(device, DTYPES[dtype])
        return {"data": (*projection.unbind(2), upstream)}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if not truth:
            truth.extend(exact(given, step))
        return {"error": max(relative_error(o, t) for o, t in zip(output, truth, strict=True))}

    tensors = 8 if step else 4  # read or written once: q, k, v, out, and with the backward their gradients
    return Case(
        name=f"{group}/{shape}-{dtype}",
        group=group,
        contestants=contestants(step),
        inputs=inputs,
        judge=judge,
        flops=2.0 * PRODUCTS[group] * B * H * T * T * D,
        bytes=float(tensors * B * T * H * D * DTYPES[dtype].itemsize),
        limit=PEAKS[dtype],
        scratch_units=float(B * H * T * T),
        dims={"B": B, "T": T, "H": H, "D": D},
        tolerance=TOLERANCES[dtype],
        note=(SHAPES | CUDA_SHAPES)[shape],
    )


def cases(device: torch.device) -> list[Case]:
    shapes = SHAPES | CUDA_SHAPES if device.type == "cuda" else SHAPES
    return [attention_case(group, shape, dtype, device) for group in PRODUCTS for shape in shapes for dtype in DTYPES]


# -- bars -------------------------------------------------------------------------------------------------------------

LONG_MS, SPEED, MICROSECONDS = 1.0, 0.971, 8.0  # 1 / 1.03 is 0.971


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises on a CPU: where SDPA takes a millisecond, within 3 % of it; below, at most 8 us more."""
    found = []
    for name in (f"{group}/{shape}-{dtype}" for group in PRODUCTS for shape in SHAPES for dtype in DTYPES):
        own, rival = (believed_ms(results, name, who)[0] for who in ("ours", "SDPA"))
        if rival is None or rival >= LONG_MS:
            found.append(faster(results, name, "ours", "SDPA", SPEED))
        else:
            more = None if own is None else 1e3 * (own - rival)
            found.append(below(f"{name}: microseconds that ours takes beyond SDPA", more, MICROSECONDS))
    return found
