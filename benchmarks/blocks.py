"""DiT blocks forward and backward, the moving average of a model, and whole training steps of DiT as a script has them.

Shapes are B x T x D x H: samples, tokens, channels, heads.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.bars import Bar, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers import dit_script
from benchmarks.peers.compiled import compile_static

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "autocast": 5e-2}  # relative, of what is furthest off
PEAKS = {"fp32": "fma_gflops", "bf16": "bf16_gflops", "autocast": "bf16_gflops"}
QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # what a call allocates must not cost what glibc did with the last
QUICK = ("block/1x256x384x6-bf16",)
BLOCKS = {
    "8x256x384x6": "DiT-S/2, 256 px",
    "1x256x384x6": "DiT-S/2, 256 px, one sample",
    "2x256x1152x16": "DiT-XL/2, 256 px",
    "1x1024x1152x16": "DiT-XL/2, 512 px",
}
MODEL, SAMPLES = (384, 12, 6), 4  # DiT-S/2


def patched(module: nn.Module) -> nn.Module:
    import mmgen_kernels as mk

    mk.patch(module, strict=True)
    return module


def compiled(module: nn.Module) -> Callable:
    return compile_static(module, next(module.parameters()).device)


# -- a block ----------------------------------------------------------------------------------------------------------


def block_of(dim: int, heads: int) -> nn.Module:
    return dit_script.DiT(dim, 1, heads).blocks[0]


def gradients(prepare: Callable[[nn.Module], Callable]) -> Callable[..., Callable]:
    """`make` of a contestant: the block's output and all gradients."""

    def make(block: nn.Module, x: Tensor, c: Tensor, upstream: Tensor) -> Callable:
        block = copy.deepcopy(block)
        run = prepare(block)
        leaves = [t.detach().requires_grad_() for t in (x, c)]
        leaves += list(block.parameters())

        def both():
            out = run(*leaves[:2])
            return out.detach(), *torch.autograd.grad(out, leaves, upstream)

        return both

    return make


def relative_error(got: Tensor, true: Tensor) -> float:
    return float((got.double().cpu() - true).square().mean().sqrt() / true.square().mean().sqrt())


def block_case(shape: str, dtype: str, device: torch.device) -> Case:
    B, T, D, H = (int(size) for size in shape.split("x"))
    truth: list[Tensor] = []

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        t = min(T, 16) if tiny else T
        tensors = (torch.randn(*s, D, generator=generator).to(device, DTYPES[dtype]) for s in ((B, t), (B,), (B, t)))
        return {"data": (block_of(D, H).to(device, DTYPES[dtype]), *tensors)}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if not truth:
            truth.extend(gradients(lambda block: block)(*(g.double().cpu() for g in copy.deepcopy(given)))())
        return {"error": max(relative_error(o, t) for o, t in zip(output, truth, strict=True))}

    return Case(
        name=f"block/{shape}-{dtype}",
        group="block",
        contestants=[
            Contestant("ours", gradients(patched), requires="mmgen_kernels"),
            Contestant("eager", gradients(lambda block: block)),
            Contestant("compile", gradients(compiled), compiles=True),
        ],
        inputs=inputs,
        judge=judge,
        flops=flops(B, T, D, 1),
        bytes=float(2 * 16 * D * D * DTYPES[dtype].itemsize),  # weights and their gradients
        limit=PEAKS[dtype],
        dims={"B": B, "T": T, "D": D, "H": H},
        tolerance=TOLERANCES[dtype],
        note=BLOCKS[shape],
    )


def flops(B: int, T: int, D: int, depth: int) -> float:
    """Forward and backward: products with 12 D x D weights for each token, attention's with all tokens, vectors' of samples."""
    return 3.0 * depth * B * (24 * T * D * D + 12 * D * D) + 2.0 * 7 * depth * B * T * T * D


# -- a training step --------------------------------------------------------------------------------------------------


def training(prepare: Callable[[nn.Module], Callable], ours: bool, autocast: bool) -> Callable[..., Callable]:
    """`make` of a contestant: a step of DiT's script, whose result is the loss and the gradient of the first layer. The learning
    rate is 0, so that every step is the same."""

    def make(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Callable:
        model = copy.deepcopy(model)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        run, update_ema = prepare(model), dit_script.update_ema
        if ours:
            import mmgen_kernels as mk

            update_ema = mk.update_ema

        def step():
            with torch.autocast(x.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = (run(x, t, y).float() - target).square().mean() if autocast else (run(x, t, y) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_ema(ema, model)
            return loss.detach(), model.x_embedder.weight.grad

        return step

    return make


def training_case(precision: str, device: torch.device) -> Case:
    D, depth, H = MODEL
    autocast, truth = precision == "autocast", []

    def inputs(tiny: bool) -> dict[str, tuple]:
        generator = torch.Generator().manual_seed(0)
        model = dit_script.DiT(D, 1 if tiny else depth, H).to(device)
        x, target = (torch.randn(*s, generator=generator).to(device) for s in ((SAMPLES, 4, 32, 32), (SAMPLES, 256, 32)))
        t, y = (torch.arange(SAMPLES, device=device) * 100 + 50, torch.arange(SAMPLES, device=device))
        return {"data": (model, x, t, y, target)}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        if not truth:
            model, x, t, y, target = given
            exact = (copy.deepcopy(model).double(), x.double(), t, y, target.double())
            truth.extend(training(lambda m: m, False, False)(*exact)())
        return {"error": max(relative_error(o, t) for o, t in zip(output, truth, strict=True))}

    return Case(
        name=f"step/DiT-S-2-{SAMPLES}-{precision}",
        group="step",
        contestants=[
            Contestant("ours", training(patched, True, autocast), requires="mmgen_kernels"),
            Contestant("eager", training(lambda m: m, False, autocast)),
            Contestant("compile", training(compiled, False, autocast), compiles=True),
        ],
        inputs=inputs,
        judge=judge,
        flops=flops(SAMPLES, 256, D, depth),
        bytes=0.0,
        limit=PEAKS[precision],
        dims={"B": SAMPLES, "T": 256, "D": D, "H": H},
        tolerance=TOLERANCES[precision],
        note=f"DiT-S/2, {SAMPLES} samples: forward, backward, AdamW, moving average",
    )


# -- the moving average -----------------------------------------------------------------------------------------------


def average_case(device: torch.device) -> Case:
    D, depth, H = MODEL

    def inputs(tiny: bool) -> dict[str, tuple]:
        model = dit_script.DiT(D, 1 if tiny else depth, H).to(device)
        return {"data": (model,)}

    def make(update: Callable[[], Callable]) -> Callable[..., Callable]:
        def made(model: nn.Module) -> Callable:
            ema, update_ema = copy.deepcopy(model), update()
            for parameter in ema.parameters():
                parameter.data.mul_(0.5)

            def step():
                update_ema(ema, model, 0.9999)
                return ema

            return step

        return made

    def of_ours() -> Callable:
        import mmgen_kernels as mk

        return mk.update_ema

    def judge(contestant: Contestant, given: tuple, output: nn.Module) -> dict:
        (model,) = given
        pairs = zip(output.parameters(), model.parameters(), strict=True)
        return {"error": max(relative_error(a, p.double().cpu() * (0.5 * 0.9999 + 0.0001)) for a, p in pairs)}

    numbers = sum(p.numel() for p in dit_script.DiT(D, depth, H).parameters())
    return Case(
        name="ema/DiT-S-2-fp32",
        group="ema",
        contestants=[
            Contestant("ours", make(of_ours), requires="mmgen_kernels"),
            Contestant("script", make(lambda: dit_script.update_ema)),
        ],
        inputs=inputs,
        judge=judge,
        flops=3.0 * numbers,
        bytes=12.0 * numbers,
        limit="copy_gb_s",
        dims={"N": numbers},
        tolerance=1e-6,
        note="DiT-S/2, all parameters",
    )


def cases(device: torch.device) -> list[Case]:
    blocks = [block_case(shape, dtype, device) for shape in BLOCKS for dtype in DTYPES]
    return [*blocks, average_case(device), *(training_case(precision, device) for precision in ("fp32", "autocast"))]


# -- bars -------------------------------------------------------------------------------------------------------------


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises of a training step of DiT-S/2 on a CPU."""
    found = []
    for precision in ("fp32", "autocast"):
        name = f"step/DiT-S-2-{SAMPLES}-{precision}"
        found += [faster(results, name, "ours", "eager", 1.15), faster(results, name, "ours", "compile", 1.0)]
    return found
