"""The philox family: noise from keys against noise from generators.

Shapes are batch x what a sample holds, one key per sample. No two contestants draw the same numbers, so what is judged is their
distribution: the error is sqrt(n) times the Kolmogorov-Smirnov distance, which 999 of 1000 samples of the right distribution
keep below 1.95.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from benchmarks.bars import Bar, faster, fastest
from benchmarks.harness import Case, Contestant
from benchmarks.peers import generators

SHAPES = {
    "16x16x64x64": "latents of 16 images of 512 x 512, 16 channels",
    "64x4x32x32": "latents of 64 images of 256 x 256, 4 channels",
    "16x3x256x256": "16 images of 256 x 256",
    "8x128x2048": "8 pieces of audio latents",
}
QUICK = ("normal/64x4x32x32", "uniform/64x4x32x32")
KS_LIMIT = 1.95


def _ours(function: str, implementation: str | None = None) -> Callable:
    def make(keys, out):
        import contextlib

        import mmgen_kernels as mk

        draw = getattr(mk, function)

        def call():
            with mk.use_backend(implementation) if implementation else contextlib.nullcontext():
                return draw(tuple(out.shape), keys)

        return call

    return make


def _contestants(function: str) -> tuple[Contestant, ...]:
    return (
        Contestant("ours", _ours(function), requires="mmgen_kernels"),
        Contestant("ours-triton", _ours(function, implementation="triton"), requires="triton", devices=("cuda",)),
        Contestant("ours-cuda", _ours(function, implementation="cuda"), requires="mmgen_kernels", devices=("cuda",)),
    )


NORMALS = (*_contestants("philox_normal"), generators.randn, generators.randn_per_sample, generators.numpy_normal)
UNIFORMS = (*_contestants("philox_uniform"), generators.rand, generators.numpy_uniform)


def normal_distribution(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def kolmogorov_smirnov(samples: torch.Tensor, distribution: Callable) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the true one."""
    values = samples.flatten().double().sort().values
    n = values.numel()
    steps = torch.arange(n + 1, dtype=torch.float64, device=values.device) / n
    truth = distribution(values)
    distance = torch.maximum((truth - steps[:-1]).abs().max(), (steps[1:] - truth).abs().max())
    return math.sqrt(n) * distance.item()


def _case(group: str, shape: str, device: torch.device, contestants, distribution: Callable, note: str) -> Case:
    sizes = tuple(int(size) for size in shape.split("x"))
    count = math.prod(sizes)

    def inputs(tiny: bool) -> dict[str, tuple]:
        import mmgen_kernels as mk

        size = (2, 8) if tiny else sizes
        keys = mk.fold_in(torch.tensor([2026, 0]), torch.arange(size[0]))
        return {"data": (keys.to(device), torch.empty(size, device=device))}

    def judge(contestant: Contestant, given: tuple, noise) -> dict:
        return {"error": kolmogorov_smirnov(noise, distribution)}

    return Case(
        name=f"{group}/{shape}",
        group=group,
        contestants=contestants,
        inputs=inputs,
        judge=judge,
        flops=0.0,
        bytes=4.0 * count,
        limit="copy_gb_s",
        dims={"B": sizes[0], "elements": count},
        tolerance=KS_LIMIT,
        note=note,
    )


def cases(device: torch.device) -> list[Case]:
    return [
        *(_case("normal", shape, device, NORMALS, normal_distribution, note) for shape, note in SHAPES.items()),
        *(_case("uniform", shape, device, UNIFORMS, lambda u: u.clamp(0, 1), note) for shape, note in SHAPES.items()),
    ]


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises of this family; `results` maps case names to their records."""
    normals = [name for name in results if name.startswith("normal/")]
    rivals = ("randn", "randn-per-sample", "rand", "numpy")
    return [
        *(faster(results, name, "ours", "randn", 1.4) for name in normals),
        *(fastest(results, name, "ours", rivals) for name in results),
    ]
