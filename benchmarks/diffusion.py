"""Losses and sampling steps of a GaussianDiffusion as DiT's scripts have it, without the model, and whole training steps with it.

Shapes are B x C x S x S: latents. What each launches and waits for is counted by `benchmarks.launches`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.bars import Bar, faster
from benchmarks.blocks import flops, relative_error
from benchmarks.harness import Case, Contestant
from benchmarks.launches import Script, script, script_diffusion
from benchmarks.peers import dit_script
from benchmarks.peers.compiled import compile_static

QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True
LATENTS = {"32x4x32x32": "DiT, 256 px", "8x4x64x64": "DiT, 512 px"}
STEPS = {"p_sample": {}, "ddim_sample": {"eta": 0.0}}
MODEL, SAMPLES = (384, 12, 6), 4  # DiT-S/2
QUICK = ("losses/8x4x64x64",)
TIMES = (0, 1, 100, 500, 999)
TOLERANCE = 1e-4
STEP_CASES = {"fp32": f"step/DiT-S-2-{SAMPLES}", "autocast": f"step/DiT-S-2-{SAMPLES}-autocast"}
STEP_TOLERANCES = {"fp32": 1e-3, "autocast": 5e-2}


def diffusion_of(who: str) -> Any:
    import mmgen_kernels as mk

    if who == "ours":
        return mk.create_diffusion("")
    found = script_diffusion()
    if who == "patched":
        mk.patch(found, strict=True)
    return found


def latents(shape: str, device: torch.device, tiny: bool) -> tuple[Tensor, ...]:
    """x, noise, the model's output and t. As after some training: about the noise, and something of the variance."""
    B, C, S, _ = (int(size) for size in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    x, z, error, v = (torch.randn(2 if tiny else B, C, S, S, generator=generator) for _ in range(4))
    t = torch.tensor(TIMES).repeat(len(x))[: len(x)]
    return tuple(tensor.to(device) for tensor in (x.clamp(-1, 1), z, torch.cat((z + 0.3 * error, v.tanh()), 1), t))


def exact() -> Any:
    found = script_diffusion()
    found.precision = torch.float64
    return found


# -- losses -------------------------------------------------------------------------------------------------------------


def losses_of(diffusion: Any, compiled: bool = False) -> Callable[..., Callable]:
    """The mean loss and the gradient of the model's output."""

    def make(x: Tensor, z: Tensor, output: Tensor, t: Tensor) -> Callable:
        leaf = output.detach().requires_grad_()

        def loss() -> Tensor:
            return diffusion.training_losses(lambda x, t: leaf, x, t, noise=z)["loss"].mean()

        run = compile_static(loss, x.device) if compiled else loss

        def both() -> tuple[Tensor, Tensor]:
            found = run()
            return found.detach(), *torch.autograd.grad(found, [leaf])

        return both

    return make


def losses_case(shape: str, device: torch.device) -> Case:
    truth: list[Tensor] = []

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if not truth:
            *tensors, t = given
            truth.extend(losses_of(exact())(*(g.double().cpu() for g in tensors), t.cpu())())
        return {"error": max(relative_error(o, e) for o, e in zip(output, truth, strict=True))}

    return case(f"losses/{shape}", "losses", shape, losses_of, judge, device, tensors=5)


# -- a step of sampling -------------------------------------------------------------------------------------------------


def step_of(name: str) -> Callable[..., Callable[..., Callable]]:
    def of(diffusion: Any, compiled: bool = False) -> Callable[..., Callable]:
        def make(x: Tensor, z: Tensor, output: Tensor, t: Tensor) -> Callable:
            def once() -> tuple[Tensor, Tensor]:
                out = getattr(diffusion, name)(lambda x, t: output, x, t, clip_denoised=False, **STEPS[name])
                return out["sample"], out["pred_xstart"]

            return torch.no_grad()(compile_static(once, x.device) if compiled else once)

        return make

    return of


def step_case(name: str, shape: str, device: torch.device) -> Case:
    truth: list[Tensor] = []

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        """By x_0: the sample has noise of its own."""
        if not truth:
            *tensors, t = given
            truth.extend(step_of(name)(exact())(*(g.double().cpu() for g in tensors), t.cpu())())
        return {"error": relative_error(output[1], truth[1])}

    return case(f"{name}/{shape}", name, shape, step_of(name), judge, device, tensors=6)


def case(
    name: str, group: str, shape: str, of: Callable[..., Callable], judge: Callable, device: torch.device, tensors: int
) -> Case:
    B, C, S, _ = (int(size) for size in shape.split("x"))
    return Case(
        name=name,
        group=group,
        contestants=[
            Contestant("ours", lambda *given: of(diffusion_of("ours"))(*given), requires="mmgen_kernels"),
            Contestant("ours, patched", lambda *given: of(diffusion_of("patched"))(*given), requires="mmgen_kernels"),
            Contestant("eager", lambda *given: of(diffusion_of("script"))(*given)),
            Contestant("compile", lambda *given: of(diffusion_of("script"), compiled=True)(*given), compiles=True),
        ],
        inputs=lambda tiny: {"data": latents(shape, device, tiny)},
        judge=judge,
        flops=0.0,
        bytes=4.0 * tensors * B * C * S * S,
        limit="copy_gb_s",
        dims={"B": B, "C": C, "S": S},
        tolerance=TOLERANCE,
        note=LATENTS[shape],
    )


# -- a training step ----------------------------------------------------------------------------------------------------


def training(parts: Callable[[Any], Script], autocast: bool = False) -> Callable[..., Callable]:
    """A step of the script: the loss and the first layer's gradient. With a learning rate of 0 and one seed, each is the same."""

    def make(model: Any, x: Tensor, y: Tensor) -> Callable:
        found = parts(copy.deepcopy(model))
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(found.model.parameters(), lr=0.0, weight_decay=0.0)

        def step() -> tuple[Tensor, Tensor]:
            torch.manual_seed(0)
            parts = (found.model, ema, optimizer, found.diffusion, found.update_ema)
            loss = dit_script.training_step(*parts, x, y, torch.bfloat16 if autocast else None)
            return loss, found.model.x_embedder.weight.grad

        return step

    return make


class CompiledLosses:
    """The script's losses with its model as one graph. The normals are drawn before it: Inductor's own are others."""

    def __init__(self, diffusion: Any, model: Any):
        self.num_timesteps = diffusion.num_timesteps

        def losses(x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
            return diffusion.training_losses(model, x, t, {"y": y}, noise=noise)

        self.losses = compile_static(losses, next(model.parameters()).device)

    def training_losses(self, model: Any, x: Tensor, t: Tensor, model_kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.losses(x, t, model_kwargs["y"], torch.randn_like(x))


def compiled_script(model: Any) -> Script:
    found = script(False, model)
    found.diffusion = CompiledLosses(found.diffusion, model)
    return found


def in_fp64(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The same step, with the normals that fp32 draws."""
    parts = script(False, copy.deepcopy(model).cpu().double())
    parts.diffusion.precision = torch.float64
    with mock.patch.object(torch, "randn_like", lambda like: torch.randn(like.shape).to(like)):
        return training(lambda model: parts)(parts.model, x.cpu().double(), y.cpu())()


def training_case(precision: str, device: torch.device) -> Case:
    D, depth, H = MODEL
    autocast = precision == "autocast"
    truth: list[Tensor] = []

    def inputs(tiny: bool) -> dict[str, tuple]:
        model = dit_script.LatentDiT(D, 1 if tiny else depth, H).to(device)
        x = torch.randn(SAMPLES, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        return {"data": (model, x.clamp(-1, 1), torch.arange(SAMPLES, device=device))}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if not truth:
            truth.extend(in_fp64(*given))
        return {"error": max(relative_error(o, e) for o, e in zip(output, truth, strict=True))}

    return Case(
        name=STEP_CASES[precision],
        group="step",
        contestants=[
            Contestant("ours", training(lambda model: script(True, model), autocast), requires="mmgen_kernels"),
            Contestant("eager", training(lambda model: script(False, model), autocast)),
            Contestant("compile", training(compiled_script, autocast), compiles=True),
        ],
        inputs=inputs,
        judge=judge,
        flops=flops(SAMPLES, 256, D, depth),
        bytes=0.0,
        limit="bf16_gflops" if autocast else "fma_gflops",
        dims={"B": SAMPLES, "T": 256, "D": D, "H": H},
        tolerance=STEP_TOLERANCES[precision],
        note=f"DiT-S/2, {SAMPLES} samples, {precision}: losses with the bound, backward, AdamW, moving average",
    )


def cases(device: torch.device) -> list[Case]:
    found = [losses_case(shape, device) for shape in LATENTS]
    found += [step_case(name, shape, device) for name in STEPS for shape in LATENTS]
    return [*found, *(training_case(precision, device) for precision in STEP_CASES)]


# -- bars ---------------------------------------------------------------------------------------------------------------


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises of a script that is patched, on a CPU."""
    found = [faster(results, f"losses/{shape}", "ours, patched", "eager", 3.0) for shape in LATENTS]
    found += [faster(results, f"p_sample/{shape}", "ours, patched", "eager", 2.0) for shape in LATENTS]
    for name in STEP_CASES.values():
        found += [faster(results, name, "ours", "eager", 1.15), faster(results, name, "ours", "compile", 1.0)]
    return found
