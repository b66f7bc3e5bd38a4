"""Attention of two streams with each other, as text and image have it in MMDiT and FLUX, forward alone and with the backward.

Shapes are B x S x T x H x D: samples, tokens of the text, tokens of the image, heads, channels of a head. q, k and v of a stream
are views of its packed projection. "joined" is what models write: cat, torch's `scaled_dot_product_attention`, split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attn import DTYPES, PEAKS, PRODUCTS, TOLERANCES, exact, relative_error
from benchmarks.bars import Bar, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers.compiled import compile_static

QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # what a call allocates must not cost what glibc did with the last
QUICK = ("forward/2x77x256x16x64-bf16", "step/2x77x256x16x64-bf16")
SHAPES = {
    "2x77x256x16x64": "MMDiT, 256 px, one text encoder",
    "1x154x1024x24x64": "Stable Diffusion 3 medium, 512 px, without T5",
    "1x333x1024x24x64": "Stable Diffusion 3.5 medium, 512 px",
    "1x512x1024x24x128": "FLUX.1, 512 px",
}


def joined(queries: tuple, keys: tuple, values: tuple) -> tuple[Tensor, ...]:
    """What the next Linear reads: (B, S, H D) and (B, T, H D)."""
    q, k, v = (torch.cat(streams, 1).transpose(1, 2) for streams in (queries, keys, values))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return out.split([q.shape[1] for q in queries], 1)


def ours(queries: tuple, keys: tuple, values: tuple) -> tuple[Tensor, ...]:
    import mmgen_kernels as mk

    return tuple(out.flatten(2) for out in mk.joint_attention(queries, keys, values))


def timed(attend: Callable, step: bool, compiled: bool = False) -> Callable[..., Callable]:
    """`make` of a contestant: the results, or with the backward the results and the gradients of both projections."""

    def make(text: Tensor, image: Tensor, of_text: Tensor, of_image: Tensor) -> Callable:
        def forward(*projections: Tensor):  # (B, S, 3, H, D), (B, T, 3, H, D)
            return attend(*zip(*(p.unbind(2) for p in projections), strict=True))

        run = compile_static(forward, text.device) if compiled else forward
        if not step:
            return torch.no_grad()(lambda: run(text, image))
        leaves = [t.detach().requires_grad_() for t in (text, image)]

        def both():
            outputs = run(*leaves)
            return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, (of_text, of_image))

        return both

    return make


def contestants(step: bool) -> list[Contestant]:
    return [
        Contestant("ours", timed(ours, step), requires="mmgen_kernels"),
        Contestant("joined", timed(joined, step)),
        Contestant("compiled", timed(joined, step, compiled=True), compiles=True),
    ]


def truth_of(given: tuple[Tensor, ...], step: bool) -> list[Tensor]:
    """In fp64: attention of the joined streams, head by head."""
    text, image, of_text, of_image = given
    S, H, D = text.shape[1], *text.shape[3:]
    upstream = torch.cat((of_text, of_image), 1).unflatten(-1, (H, D))
    out, *grads = exact((*torch.cat((text, image), 1).unbind(2), upstream), step)
    found = [out.flatten(2)[:, :S], out.flatten(2)[:, S:]]
    if step:
        of_projection = torch.stack(grads, 2)
        found += [of_projection[:, :S], of_projection[:, S:]]
    return found


def joint_case(group: str, shape: str, dtype: str, device: torch.device) -> Case:
    B, S, T, H, D = (int(size) for size in shape.split("x"))
    step, truth = group == "step", []

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        lengths = (8, 16) if tiny else (S, T)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, DTYPES[dtype])

        return {"data": (*(draw(B, n, 3, H, D) for n in lengths), *(draw(B, n, H * D) for n in lengths))}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if not truth:
            truth.extend(truth_of(given, step))
        return {"error": max(relative_error(o, t) for o, t in zip(output, truth, strict=True))}

    tensors = 8 if step else 4  # read or written once: q, k, v, out, and with the backward their gradients
    return Case(
        name=f"{group}/{shape}-{dtype}",
        group=group,
        contestants=contestants(step),
        inputs=inputs,
        judge=judge,
        flops=2.0 * PRODUCTS[group] * B * H * (S + T) ** 2 * D,
        bytes=float(tensors * B * (S + T) * H * D * DTYPES[dtype].itemsize),
        limit=PEAKS[dtype],
        dims={"B": B, "S": S, "T": T, "H": H, "D": D},
        tolerance=TOLERANCES[dtype],
        note=SHAPES[shape],
    )


def cases(device: torch.device) -> list[Case]:
    return [joint_case(group, shape, dtype, device) for group in PRODUCTS for shape in SHAPES for dtype in DTYPES]


# -- bars -------------------------------------------------------------------------------------------------------------

LARGEST = "1x512x1024x24x128"
SPEEDS = {"fp32": 1 / 1.15, "bf16": 1.0}


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises on a CPU: fp32 in at most 1.15 of the time of cat, SDPA and split, bf16 in no more than theirs, and
    without the memory that cat takes."""
    found = []
    for group in PRODUCTS:
        for shape in SHAPES:
            found += [faster(results, f"{group}/{shape}-{dtype}", "ours", "joined", speed) for dtype, speed in SPEEDS.items()]
    for dtype in DTYPES:
        case = results.get(f"forward/{LARGEST}-{dtype}", {}).get("contestants", {})
        extra = [case.get(name, {}).get("extra_bytes") for name in ("joined", "ours")]
        B, S, T, H, D = (int(size) for size in LARGEST.split("x"))
        copies = 3 * B * (S + T) * H * D * DTYPES[dtype].itemsize
        saved = None if None in extra else (extra[0] - extra[1]) / copies
        found.append(Bar(f"forward/{LARGEST}-{dtype}: memory saved, in copies of q, k and v", saved, 0.9))
    return found
