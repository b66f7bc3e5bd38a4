"""Losses of diffusion models in a training step: forward, and the gradient of the model's output.

"script" is OpenAI's process as DiT's scripts run it, given the x_t that the model has seen, and of diffusion_loss what diffusers'
training scripts write; "lean" is the same loss written as well as eager PyTorch allows, which "compile" compiles. Shapes are x0's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bars import Bar, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers import lean_diffusion, openai_diffusion
from benchmarks.peers.compiled import compile_static

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-3, "bf16": 1e-2}  # relative rms of losses and of the gradient
QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # a gradient is all that ours allocates, and what it costs must not depend on the last one to free it
QUICK = ("hybrid/16x4x32x32-fp32", "loss/mse-16x16x64x64-bf16")
T = 1000
BETAS = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
SHAPES = ((16, 4, 32, 32), (16, 16, 64, 64))
KINDS = ("mse", "pseudo_huber")
DELTA = 0.1

Make = Callable[..., Callable[[], Any]]


def named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def step_with(loss_of: Callable[..., Tensor], output: Tensor, *rest: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    """Losses and the gradient of the batch's mean by the model's output."""
    leaf = output.detach().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        losses = loss_of(leaf, *rest)
        return losses.detach(), torch.autograd.grad(losses.mean(), leaf)[0]

    return call


def relative_error(output: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    pairs = zip(output, truth, strict=True)
    return max(float((got.double() - true).square().mean().sqrt() / true.square().mean().sqrt()) for got, true in pairs)


def judged(truth_of: Callable[..., tuple[Tensor, ...]]) -> Callable[[Contestant, tuple, Any], dict]:
    truth: list[tuple[Tensor, ...]] = []

    def judge(contestant: Contestant, given: tuple, output: Any) -> dict:
        if not truth:
            truth.append(truth_of(*given))
        return {"error": relative_error(output, truth[0])}

    return judge


# -- hybrid_loss ------------------------------------------------------------------------------------------------------


def ours_hybrid(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Callable[[], Any]:
    import mmgen_kernels as mk

    table = mk.hybrid_table(BETAS).to(x0.device)
    return step_with(lambda o: mk.hybrid_loss(o, x0, noise, t, table=table).loss, output)


def script(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, precision: torch.dtype = torch.float32) -> Callable[[], Any]:
    kinds = (openai_diffusion.ModelMeanType.EPSILON, openai_diffusion.ModelVarType.LEARNED_RANGE, openai_diffusion.LossType.MSE)
    names = ("model_mean_type", "model_var_type", "loss_type")
    process = openai_diffusion.GaussianDiffusion(betas=BETAS.numpy(), **dict(zip(names, kinds, strict=True)))
    process.precision = precision
    x_t = process.q_sample(x0, t, noise=noise)
    process.q_sample = lambda *_, **__: x_t  # made before the model was called, by whoever trains
    return step_with(lambda o: process.training_losses(lambda *_, **__: o, x0, t, noise=noise)["loss"], output)


def lean(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, compiled: bool = False) -> Callable[[], Any]:
    rows = lean_diffusion.table(BETAS).to(x0.device)
    loss = compile_static(lean_diffusion.hybrid_loss, x0.device) if compiled else lean_diffusion.hybrid_loss
    return step_with(lambda o: loss(o, x0, noise, t, rows), output)


def hybrid_case(shape: tuple[int, ...], dtype: str, device: torch.device) -> Case:
    numel = torch.Size(shape).numel()

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        size = (2, 2, 4, 4) if tiny else shape
        x0, noise, off, v = (torch.randn(size, generator=generator) for _ in range(4))
        x0 = (x0.clamp(-1, 1) * 127.5).round() / 127.5
        t = torch.arange(size[0]) * (T // size[0])  # with a step that decodes, which costs ours the most
        output = torch.cat((noise + 0.3 * off, v), 1).to(DTYPES[dtype])
        return {"data": tuple(tensor.to(device) for tensor in (output, x0, noise, t))}

    def truth(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return script(output.double(), x0.double(), noise.double(), t, torch.float64)()

    # output and its gradient twice and once, noise twice; x0 is looked at where a step decodes
    moved = numel * (2 * DTYPES[dtype].itemsize * 3 + 2 * 4)
    return Case(
        name=f"hybrid/{named(shape)}-{dtype}",
        group="hybrid",
        contestants=[
            Contestant("ours", ours_hybrid, requires="mmgen_kernels"),
            Contestant("script", script),
            Contestant("lean", lean),
            Contestant("compile", lambda *given: lean(*given, compiled=True), compiles=True),
        ],
        inputs=inputs,
        judge=judged(truth),
        flops=60.0 * numel,
        bytes=float(moved),
        limit="copy_gb_s",
        dims={"B": shape[0], "elements": numel},
        tolerance=TOLERANCES[dtype],
        note="output of the model in this dtype, x0 and noise in fp32",
    )


# -- diffusion_loss ---------------------------------------------------------------------------------------------------


def element_losses(kind: str, output: Tensor, target: Tensor) -> Tensor:
    if kind == "mse":
        return F.mse_loss(output, target, reduction="none")
    return torch.sqrt((output - target) ** 2 + DELTA**2) - DELTA


def weighted(kind: str, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    each = element_losses(kind, output.float(), target.float())
    return (each.mean(dim=list(range(1, each.dim()))) * weight).mean()


def loss_case(kind: str, shape: tuple[int, ...], dtype: str, device: torch.device) -> Case:
    numel = torch.Size(shape).numel()

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        size = (2, 2, 4, 4) if tiny else shape
        output, target = (torch.randn(size, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
        return {"data": (output, target, torch.rand(size[0], generator=generator).to(device))}

    def ours(output: Tensor, target: Tensor, weight: Tensor) -> Callable[[], Any]:
        import mmgen_kernels as mk

        return step_with(lambda o: mk.diffusion_loss(o, target, weight=weight, kind=kind, delta=DELTA), output)

    def eager(output: Tensor, target: Tensor, weight: Tensor, compiled: bool = False) -> Callable[[], Any]:
        loss = compile_static(weighted, output.device) if compiled else weighted
        return step_with(lambda o: loss(kind, o, target, weight), output)

    def truth(output: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        def exact(o: Tensor) -> Tensor:
            return (element_losses(kind, o, target.double()).flatten(1).mean(1) * weight.double()).mean()

        return step_with(exact, output.double())()

    return Case(
        name=f"loss/{kind}-{named(shape)}-{dtype}",
        group="loss",
        contestants=[
            Contestant("ours", ours, requires="mmgen_kernels"),
            Contestant("script", eager),
            Contestant("compile", lambda *given: eager(*given, compiled=True), compiles=True),
        ],
        inputs=inputs,
        judge=judged(truth),
        flops=6.0 * numel,
        bytes=float(5 * numel * DTYPES[dtype].itemsize),  # both tensors twice, a gradient
        limit="copy_gb_s",
        dims={"B": shape[0], "elements": numel},
        tolerance=TOLERANCES[dtype],
        note="a weight per sample",
    )


def cases(device: torch.device) -> list[Case]:
    found = [hybrid_case(shape, dtype, device) for shape in SHAPES for dtype in DTYPES]
    return found + [loss_case(kind, shape, dtype, device) for kind in KINDS for shape in SHAPES for dtype in DTYPES]


# -- bars -------------------------------------------------------------------------------------------------------------


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises on one thread of a CPU; `results` maps case names to their records."""
    hybrid = [f"hybrid/{named(shape)}-{dtype}" for shape in SHAPES for dtype in DTYPES]
    loss = [f"loss/{kind}-{named(shape)}-{dtype}" for kind in KINDS for shape in SHAPES for dtype in DTYPES]
    found = [faster(results, case, "ours", "script", 20.0) for case in hybrid]
    found += [faster(results, case, "ours", "lean", 5.0) for case in hybrid]
    found += [faster(results, case, "ours", "script", 2.0) for case in loss]
    return found + [faster(results, case, "ours", "compile", 1.0) for case in (*hybrid, *loss)]
