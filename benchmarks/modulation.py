"""Norm, modulation, gate and residual as DiT blocks have them, forward alone and with the backward.

Shapes are B x T x D: samples, tokens, channels. "clone" is the floor: copies that move the bytes which the operation must move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bars import Bar, believed_ms, below, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers import liger
from benchmarks.peers.compiled import compile_static

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of what is furthest off; eager bf16 is at 6e-3
QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # outputs are all that is allocated, and what they cost must not depend on what glibc did with the last
QUICK = ("seam/8x256x1152-bf16", "seam-step/8x256x1152-bf16")


@dataclass(frozen=True)
class Model:
    """How a model modulates."""

    note: str
    dtypes: tuple[str, ...]
    norm: str = "layer"
    gate_fn: str = "identity"
    sandwich: bool = False  # y is normalised too
    per_token: bool = False


MODELS = {
    "8x256x1152": Model("DiT-XL/2, 256 px", ("fp32", "bf16")),
    "1x4096x3072": Model("FLUX.1, 1024 px", ("bf16",)),
    "1x4096x2304": Model("Lumina-Next, 1024 px: RMS, tanh gate, sandwich norm", ("bf16",), "rms", "tanh", True),
    "1x2048x3072": Model("Wan2.2-TI2V-5B: a vector per token", ("bf16",), per_token=True),
}
Inputs = tuple[Tensor, ...]  # x, y, vectors (gate, shift, scale side by side, as one Linear gives them), upstream gradients


# -- the operation as model code writes it ----------------------------------------------------------------------------


def norm(x: Tensor, kind: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) if kind == "layer" else F.rms_norm(x, x.shape[-1:], eps=1e-6)


def plain_adaln(x: Tensor, y: Tensor, vectors: Tensor, model: Model) -> tuple[Tensor, ...]:
    _, shift, scale = (vectors if model.per_token else vectors[:, None]).chunk(3, -1)
    return (norm(x, model.norm) * (1 + scale) + shift,)


def plain_seam(x: Tensor, y: Tensor, vectors: Tensor, model: Model) -> tuple[Tensor, ...]:
    gate, shift, scale = (vectors if model.per_token else vectors[:, None]).chunk(3, -1)
    gate = gate.tanh() if model.gate_fn == "tanh" else gate
    residual = x + gate * (norm(y, model.norm) if model.sandwich else y)
    return residual, norm(residual, model.norm) * (1 + scale) + shift


def our_adaln(x: Tensor, y: Tensor, vectors: Tensor, model: Model) -> tuple[Tensor, ...]:
    import mmgen_kernels as mk

    _, shift, scale = vectors.chunk(3, -1)
    return (mk.adaln(x, shift, scale, norm=model.norm),)


def our_seam(x: Tensor, y: Tensor, vectors: Tensor, model: Model) -> tuple[Tensor, ...]:
    import mmgen_kernels as mk

    post_norm = model.norm if model.sandwich else None
    return mk.gate_residual_adaln(x, y, *vectors.chunk(3, -1), norm=model.norm, gate_fn=model.gate_fn, post_norm=post_norm)


OPERATIONS = {"adaln": (plain_adaln, our_adaln), "seam": (plain_seam, our_seam)}


# -- contestants ------------------------------------------------------------------------------------------------------


def timed(function: Callable, model: Model, step: bool, compiled: bool) -> Callable[..., Callable]:
    """`make` of a contestant: the outputs, or with the backward the outputs and the gradients of x, y and the vectors."""

    def make(x: Tensor, y: Tensor, vectors: Tensor, *upstream: Tensor) -> Callable:
        def forward(x, y, vectors):
            return function(x, y, vectors, model)

        run = compile_static(forward, x.device) if compiled else forward
        if not step:
            return torch.no_grad()(lambda: run(x, y, vectors))
        leaves = [t.detach().requires_grad_() for t in (x, y, vectors)]

        def both():
            outputs = run(*leaves)
            grads = torch.autograd.grad(outputs, leaves, upstream[: len(outputs)], allow_unused=True)
            return *(o.detach() for o in outputs), *(g for g in grads if g is not None)

        return both

    return make


def clones(count: int) -> Callable[..., Callable]:
    return lambda x, y, *_: lambda: tuple(t.clone() for t in (x, y)[:count])


def contestants(group: str, model: Model) -> list[Contestant]:
    operation, _, step = group.partition("-")
    plain, ours = OPERATIONS[operation]
    racing = [
        Contestant("ours", timed(ours, model, bool(step), False), requires="mmgen_kernels"),
        Contestant("ours, compiled", timed(ours, model, bool(step), True), requires="mmgen_kernels", compiles=True),
        Contestant("eager", timed(plain, model, bool(step), False)),
        Contestant("compile", timed(plain, model, bool(step), True), compiles=True),
    ]
    if model.norm == "rms" and operation == "adaln":
        racing.append(Contestant("liger", timed(liger.adaln, model, bool(step), False), requires="liger_kernel", devices=("cuda",)))
    if not step:
        racing.append(Contestant("clone", clones(1 if operation == "adaln" else 2), settings={"floor": True}))
    return racing


# -- cases ------------------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp(min=1e-300))


def modulation_case(group: str, shape: str, dtype: str, device: torch.device) -> Case:
    model = MODELS[shape]
    operation, _, step = group.partition("-")
    B, T, D = (int(size) for size in shape.split("x"))
    truth: list[Tensor] = []

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        t = min(T, 8) if tiny else T
        leading = (B, t) if model.per_token else (B,)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, DTYPES[dtype])

        return {"data": (draw(B, t, D), draw(B, t, D), draw(*leading, 3 * D), draw(B, t, D), draw(B, t, D))}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if contestant.settings.get("floor"):
            return {"error": 0.0}
        if not truth:
            exact = timed(OPERATIONS[operation][0], model, bool(step), False)
            truth.extend(exact(*(t.double() for t in given))())
        return {"error": max(relative_error(o, t) for o, t in zip(output, truth, strict=True))}

    passes = {"adaln": 2, "seam": 4, "adaln-step": 2 + 3, "seam-step": 4 + 6}[group]  # over one activation, read or written
    return Case(
        name=f"{group}/{shape}-{dtype}",
        group=group,
        contestants=contestants(group, model),
        inputs=inputs,
        judge=judge,
        flops=10.0 * B * T * D,
        bytes=float(passes * B * T * D * DTYPES[dtype].itemsize),
        limit="copy_gb_s",
        dims={"B": B, "T": T, "D": D},
        tolerance=TOLERANCES[dtype],
        note=model.note,
    )


def cases(device: torch.device) -> list[Case]:
    groups = ("adaln", "seam", "adaln-step", "seam-step")
    return [
        modulation_case(group, shape, dtype, device)
        for group in groups
        for shape, model in MODELS.items()
        for dtype in model.dtypes
        if group.startswith("seam") or shape == "8x256x1152"
    ]


# -- bars -------------------------------------------------------------------------------------------------------------

FLOORS = {("adaln", "fp32"): 1.5, ("adaln", "bf16"): 1.9, ("seam", "fp32"): 1.4, ("seam", "bf16"): 1.7}  # times the clones


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises on a CPU; `results` maps case names to their records."""
    found = []
    for (operation, dtype), limit in FLOORS.items():
        name = f"{operation}/8x256x1152-{dtype}"
        ours, clone = (believed_ms(results, name, who)[0] for who in ("ours", "clone"))
        found.append(below(f"{name}: ours over clones of the same bytes", ours and clone and ours / clone, limit))
        step = f"{operation}-step/8x256x1152-{dtype}"
        found += [faster(results, step, "ours", "eager", 2.5), faster(results, step, "ours", "compile", 1.3)]
    return found
