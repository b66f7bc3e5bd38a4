"""qk_norm_rope as models have it between the projection and the attention, forward alone and with the backward.

Shapes are B x T x H x D: samples, tokens, heads, channels of a head. q and k are views of a packed projection. "clone" is the
floor: two copies that move the bytes which the operation must move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bars import Bar, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers.compiled import compile_static

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of what is furthest off
QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # outputs are all that is allocated, and what they cost must not depend on what glibc did with the last
QUICK = ("forward/2x1024x12x64-fp32", "step/2x1024x12x64-fp32")


@dataclass(frozen=True)
class Model:
    """What a model does with q and k."""

    note: str
    norm: str = "rms"
    across: bool = False
    interleaved: bool = True
    angles: bool = True


MODELS = {
    "2x1024x12x64": Model("DiT-B/2 with RMS norm and RoPE, 512 px"),
    "2x1024x16x72": Model("DiT-XL/2 with RMS norm and RoPE, 512 px", interleaved=False),
    "1x4608x24x128": Model("FLUX.1, 1024 px: 4096 tokens of the image and 512 of text"),
    "1x2048x12x128": Model("Wan2.1-1.3B: RMS norm across heads", across=True),
    "1x1024x30x64": Model("CogVideoX-2B: layer norm with bias, no angles", norm="layer", angles=False),
}


# -- the operation as model code writes it ----------------------------------------------------------------------------


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, model: Model) -> Tensor:
    if model.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor, model: Model) -> Tensor:
    """In fp32, with tables (T, D) that hold each angle twice."""
    if model.interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        other = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    cos, sin = cos[:, None], sin[:, None]
    return (x.to(cos.dtype) * cos + other.to(cos.dtype) * sin).to(x.dtype)


def plain(q: Tensor, k: Tensor, parameters: tuple[Tensor, ...], cos: Tensor, sin: Tensor, model: Model) -> tuple[Tensor, ...]:
    q_weight, k_weight, q_bias, k_bias = parameters if len(parameters) == 4 else (*parameters, None, None)
    out = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        rows = normed(x.flatten(2) if model.across else x, weight, bias, model).view(x.shape)
        out.append(turned(rows, cos, sin, model) if model.angles else rows)
    return tuple(out)


def ours(q: Tensor, k: Tensor, parameters: tuple[Tensor, ...], cos: Tensor, sin: Tensor, model: Model) -> tuple[Tensor, ...]:
    """The same tables as views."""
    import mmgen_kernels as mk

    affine = dict(zip(("q_weight", "k_weight", "q_bias", "k_bias"), parameters, strict=False))
    tables = {}
    if model.angles:
        half = cos.shape[-1] // 2
        tables = {n: t[:, ::2] if model.interleaved else t[:, :half] for n, t in (("cos", cos), ("sin", sin))}
    return mk.qk_norm_rope(q, k, norm=model.norm, across_heads=model.across, interleaved=model.interleaved, **affine, **tables)


# -- contestants ------------------------------------------------------------------------------------------------------


def timed(function: Callable, model: Model, step: bool, compiled: bool = False) -> Callable[..., Callable]:
    """`make` of a contestant: the outputs, or with the backward the outputs and the gradients of q, k and the parameters."""

    def make(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, of_q: Tensor, of_k: Tensor, *parameters: Tensor) -> Callable:
        def forward(q, k, *parameters):
            return function(q, k, parameters, cos, sin, model)

        run = compile_static(forward, q.device) if compiled else forward
        if not step:
            return torch.no_grad()(lambda: run(q, k, *parameters))
        leaves = [t.detach().requires_grad_() for t in (q, k, *parameters)]

        def both():
            outputs = run(*leaves)
            return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, (of_q, of_k))

        return both

    return make


def clones(q: Tensor, k: Tensor, *_: Tensor) -> Callable:
    return lambda: tuple(t.clone(memory_format=torch.contiguous_format) for t in (q, k))


def contestants(model: Model, step: bool) -> list[Contestant]:
    racing = [
        Contestant("ours", timed(ours, model, step), requires="mmgen_kernels"),
        Contestant("ours, compiled", timed(ours, model, step, compiled=True), requires="mmgen_kernels", compiles=True),
        Contestant("eager", timed(plain, model, step)),
        Contestant("compile", timed(plain, model, step, compiled=True), compiles=True),
    ]
    return racing if step else [*racing, Contestant("clone", clones, settings={"floor": True})]


# -- cases ------------------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, true: Tensor) -> float:
    return float((got.double().cpu() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp(min=1e-300))


def rope_case(group: str, shape: str, dtype: str, device: torch.device) -> Case:
    model, step = MODELS[shape], group == "step"
    B, T, H, D = (int(size) for size in shape.split("x"))
    truth: list[Tensor] = []

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        t = min(T, 8) if tiny else T

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, DTYPES[dtype])

        q, k, _ = draw(B, t, 3, H, D).unbind(2)
        angle = torch.arange(t, device=device)[:, None] * 1e4 ** -(torch.arange(0, D, 2, device=device) / D)
        angle = angle.repeat_interleave(2, -1) if model.interleaved else torch.cat((angle, angle), -1)  # (T, D)
        width = H * D if model.across else D
        parameters = [draw(width) for _ in range(4 if model.norm == "layer" else 2)]
        return {"data": (q, k, angle.cos(), angle.sin(), draw(B, t, H, D), draw(B, t, H, D), *parameters)}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if contestant.settings.get("floor"):
            return {"error": 0.0}
        if not truth:
            truth.extend(timed(plain, model, step)(*(t.double().cpu() for t in given))())
        return {"error": max(relative_error(o, t) for o, t in zip(output, truth, strict=True))}

    passes = 2 * (2 + 3 if step else 2)  # over q or k, read or written
    return Case(
        name=f"{group}/{shape}-{dtype}",
        group=group,
        contestants=contestants(model, step),
        inputs=inputs,
        judge=judge,
        flops=12.0 * 2 * B * T * H * D,
        bytes=float(passes * B * T * H * D * DTYPES[dtype].itemsize),
        limit="copy_gb_s",
        dims={"B": B, "T": T, "H": H, "D": D},
        tolerance=TOLERANCES[dtype],
        note=model.note,
    )


def cases(device: torch.device) -> list[Case]:
    return [rope_case(group, shape, dtype, device) for group in ("forward", "step") for shape in MODELS for dtype in DTYPES]


# -- bars -------------------------------------------------------------------------------------------------------------


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises on a CPU."""
    found = []
    for name in (f"{group}/2x1024x12x64-{dtype}" for group in ("forward", "step") for dtype in DTYPES):
        found += [faster(results, name, "ours", "eager", 4.0), faster(results, name, "ours", "compile", 1.2)]
    return found
