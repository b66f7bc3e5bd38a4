"""Steps of samplers: one in the middle of a run, whole runs of small samples, what a run in bf16 loses, and noising.

Shapes are the samples'. "clone" is the floor: copies that move the bytes which the step must move. "ours" draws the noise that
diffusers draws, "ours, philox" normals in registers. "run" is the steps of a run with an empty model, "whole-run" with all that
precedes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import Bar, believed_ms, below, faster
from benchmarks.harness import Case, Contestant
from benchmarks.peers import samplers, trajectories
from benchmarks.peers.samplers import FURTHER, SAMPLERS, Sampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # relative rms; stock fp32 with its coefficients in fp32 is at 1e-5
QUIET_SECONDS = 0.0  # everybody here computes on torch's threads: nobody else's spin
KEEPS_FREED_MEMORY = True  # outputs are all that is allocated, and what they cost must not depend on what glibc did with the last
QUICK = ("step/DDIM-8x16x128x128-bf16", "run/UniPC-1x16x7")
STEPS, K, SEED = 20, 10, 2026
LARGE, SMALL, TRAINING, PATH = (8, 16, 128, 128), ((1, 4, 64, 64), (1, 16, 7)), (16, 16, 64, 64), (4, 16, 64, 64)
RUNS = SAMPLERS | FURTHER
NOISING = ("DDPM", "Euler", "FlowMatchEuler")

Make = Callable[..., Callable[[], Any]]


def named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def draws(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count))


def error_of(outputs: Any, truth: list[Tensor]) -> float:
    pairs = list(zip(outputs, truth, strict=False))
    return max(float((got.double() - true).square().mean().sqrt() / true.square().mean().sqrt()) for got, true in pairs)


def racing(makes: dict[str, Make]) -> list[Contestant]:
    """Who runs: what has stock code in it requires diffusers."""
    requires = {"ours": "mmgen_kernels", "ours, philox": "mmgen_kernels", "clone": ""}
    return [Contestant(name, make, requires.get(name, "diffusers"), compiles=name == "compile") for name, make in makes.items()]


def patched(sampler: Sampler) -> Any:
    import mmgen_kernels as mk

    scheduler = samplers.stock(sampler)
    scheduler.handle_of_patch = mk.patch(scheduler)
    return scheduler


# -- a step in the middle of a run ------------------------------------------------------------------------------------


def one_step(of: Callable[[Sampler], Any], sampler: Sampler, compiled: bool = False) -> Make:
    """`make` of a contestant whose call is step K; the first call after it has the noise of SEED."""

    def make(sample: Tensor, output: Tensor, *past: Tensor) -> Callable[[], Any]:
        scheduler = of(sampler)
        scheduler.set_timesteps(STEPS, device=sample.device)
        t, step = scheduler.timesteps[K], scheduler.step
        if compiled:  # where it must be broken into graphs it is; the noise is eager's, which is faster than inductor's
            torch._dynamo.reset()
            step = torch.compile(step, dynamic=False, options={"fallback_random": True})

        @torch.no_grad()
        def call() -> Any:
            samplers.enter(scheduler, K, past)
            return step(output, t, sample, return_dict=False)

        torch.manual_seed(SEED)
        return call

    return make


def clones(total: int) -> Make:
    """Copies that read and write so many bytes together."""

    def make(sample: Tensor, *others: Tensor) -> Callable[[], Any]:
        whole, part = divmod(total // 2, sample.nbytes)
        pieces = [*(sample, *others)[:whole], *([others[-1].flatten()[: part // sample.element_size()]] if part else [])]
        return lambda: tuple(piece.clone() for piece in pieces)

    return make


def step_case(name: str, dtype: str, device: torch.device) -> Case:
    import mmgen_kernels as mk

    sampler = SAMPLERS[name]
    truth: dict[bool, list[Tensor]] = {}
    numel = torch.Size(LARGE).numel()
    moved = (sampler.reads + sampler.writes) * numel * DTYPES[dtype].itemsize
    if sampler.wide_data:
        moved += numel * (4 - DTYPES[dtype].itemsize)

    def inputs(tiny: bool) -> dict[str, tuple]:
        return {"data": draws((1, 4, 8, 8) if tiny else LARGE, DTYPES[dtype], device, 5)}

    def exact(given: tuple[Tensor, ...], philox: bool) -> list[Tensor]:
        """In fp64 and by the reference, with the noise that the contestant had."""
        torch.manual_seed(SEED)
        if philox:
            key = torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
            noise = mk.philox_normal(given[0].shape, mk.fold_in(key, K))
        else:
            noise = torch.randn(given[0].shape, dtype=given[0].dtype, device=device)

        def make(sampler: Sampler) -> Any:
            scheduler = samplers.ours(sampler)
            scheduler.stepper.draw = lambda *_: noise.double()
            return scheduler

        with mk.use_backend("reference"):
            return list(one_step(make, sampler)(*(t.double() for t in given))())

    def judge(contestant: Contestant, given: tuple, output: Any) -> dict:
        if contestant.name == "clone":
            return {"error": 0.0}
        philox = contestant.name == "ours, philox"
        if philox not in truth:
            truth[philox] = exact(given, philox)
        return {"error": error_of(output, truth[philox])}

    makes = {"ours": one_step(samplers.ours, sampler)}
    if sampler.noisy:
        makes["ours, philox"] = one_step(partial(samplers.ours, noise="philox"), sampler)
    makes |= {
        "ours, patched": one_step(patched, sampler),
        "diffusers": one_step(samplers.stock, sampler),
        "compile": one_step(samplers.stock, sampler, compiled=True),
        "clone": clones(moved),
    }
    return Case(
        name=f"step/{name}-{named(LARGE)}-{dtype}",
        group="step",
        contestants=racing(makes),
        inputs=inputs,
        judge=judge,
        flops=8.0 * numel,
        bytes=float(moved),
        limit="copy_gb_s",
        dims={"B": LARGE[0], "elements": numel},
        tolerance=TOLERANCES[dtype],
        note=f"{sampler.reads} tensors in, {sampler.writes} out{', noise' if sampler.noisy else ''}",
    )


# -- whole runs -------------------------------------------------------------------------------------------------------


def whole_run(of: Callable[[Sampler], Any], sampler: Sampler, prepares: bool) -> Make:
    """STEPS steps, the model giving always the same."""

    def make(sample: Tensor, output: Tensor) -> Callable[[], Any]:
        scheduler = of(sampler)
        scheduler.set_timesteps(STEPS, device=sample.device)

        @torch.no_grad()
        def call() -> Any:
            if prepares:
                scheduler.set_timesteps(STEPS, device=sample.device)
            samplers.begin(scheduler)
            x = sample
            for t in scheduler.timesteps:
                x = scheduler.step(output, t, x, return_dict=False)[0]
            return (x,)

        return call

    return make


def run_case(group: str, name: str, shape: tuple[int, ...], device: torch.device) -> Case:
    sampler, prepares = SAMPLERS[name], group != "run"
    libraries = {"ours": samplers.ours, "ours, patched": patched, "diffusers": samplers.stock}
    if sampler.noisy:
        libraries["ours, philox"] = partial(samplers.ours, noise="philox")
    numel = torch.Size(shape).numel()
    return Case(
        name=f"{group}/{name}-{named(shape)}",
        group=group,
        contestants=racing({who: whole_run(of, sampler, prepares) for who, of in libraries.items()}),
        inputs=lambda tiny: {"data": draws(shape, torch.float32, device, 2)},
        judge=lambda contestant, given, output: {"error": 0.0 if bool(output[0].isfinite().all()) else torch.inf},
        flops=8.0 * STEPS * numel,
        bytes=4.0 * STEPS * (sampler.reads + sampler.writes) * numel,
        limit="copy_gb_s",
        dims={"B": shape[0], "elements": numel},
        tolerance=0.0,  # the errors are those of the other groups; a run that ends in NaN does not count
        note=f"{STEPS} steps",
    )


# -- what a run loses in 16 bits --------------------------------------------------------------------------------------


def trajectory_case(name: str, dtype: str, device: torch.device) -> Case:
    sampler = RUNS[name]
    losses, found = trajectories.Losses(sampler, DTYPES[dtype], device), {}
    makes = {"ours": samplers.ours, "diffusers": samplers.stock}

    def judge(contestant: Contestant, given: tuple, output: Any) -> dict:
        """Of runs of all lengths, not only of that which is timed."""
        own = found[contestant.name] = losses.of(makes[contestant.name])
        errors = {"error": trajectories.mean_of(own)}
        if contestant.name != "ours" and "ours" in found:
            ratios = own / found["ours"]
            errors |= {"times_ours": trajectories.mean_of(ratios), "standard_error": trajectories.standard_error_of(ratios)}
        return errors

    def run_of(of: Callable[[Sampler], Any]) -> Make:
        return lambda start: torch.no_grad()(lambda: trajectories.sampled(of(sampler), sampler, start))

    numel, lengths = torch.Size(PATH).numel(), trajectories.lengths(sampler)
    return Case(
        name=f"trajectory/{name}-{dtype}",
        group="trajectory",
        contestants=racing({who: run_of(of) for who, of in makes.items()}),
        inputs=lambda tiny: {"data": draws(PATH, DTYPES[dtype], device, 1)},
        judge=judge,
        flops=8.0 * sampler.steps * numel,
        bytes=float(DTYPES[dtype].itemsize * sampler.steps * (sampler.reads + sampler.writes) * numel),
        limit="copy_gb_s",
        dims={"B": PATH[0], "elements": numel},
        note=f"{sampler.steps} steps, model included; errors of {lengths[0]} to {lengths[-1]}",
    )


# -- noising ----------------------------------------------------------------------------------------------------------


def noised(of: Callable[[Sampler], Any], sampler: Sampler) -> Make:
    def make(x0: Tensor, noise: Tensor) -> Callable[[], Any]:
        scheduler = of(sampler)
        scheduler.set_timesteps(STEPS, device=x0.device)
        t = scheduler.timesteps[torch.arange(len(x0), device=x0.device)]
        if hasattr(scheduler, "scale_noise"):
            return lambda: (scheduler.scale_noise(x0, t, noise),)
        return lambda: (scheduler.add_noise(x0, noise, t),)

    return make


def noising_case(name: str, dtype: str, device: torch.device) -> Case:
    import mmgen_kernels as mk

    sampler, truth = SAMPLERS[name], []

    def judge(contestant: Contestant, given: tuple, output: Any) -> dict:
        if contestant.name == "clone":
            return {"error": 0.0}
        if not truth:
            with mk.use_backend("reference"):
                truth.extend(noised(samplers.ours, sampler)(*(t.double() for t in given))())
        return {"error": error_of(output, truth)}

    numel = torch.Size(TRAINING).numel()
    moved = 3 * numel * DTYPES[dtype].itemsize
    libraries = {"ours": samplers.ours, "diffusers": samplers.stock}
    return Case(
        name=f"noising/{name}-{named(TRAINING)}-{dtype}",
        group="noising",
        contestants=racing({**{who: noised(of, sampler) for who, of in libraries.items()}, "clone": clones(moved)}),
        inputs=lambda tiny: {"data": draws(TRAINING, DTYPES[dtype], device, 2)},
        judge=judge,
        flops=3.0 * numel,
        bytes=float(moved),
        limit="copy_gb_s",
        dims={"B": TRAINING[0], "elements": numel},
        tolerance=TOLERANCES[dtype],
        note="2 tensors in, 1 out",
    )


def cases(device: torch.device) -> list[Case]:
    found = [step_case(name, dtype, device) for name in SAMPLERS for dtype in DTYPES]
    found += [trajectory_case(name, "bf16", device) for name in RUNS]
    found += [noising_case(name, dtype, device) for name in NOISING for dtype in DTYPES]
    found += [run_case("run", name, shape, device) for shape in SMALL for name in SAMPLERS]
    return found + [run_case("whole-run", name, SMALL[0], device) for name in SAMPLERS]


# -- bars -------------------------------------------------------------------------------------------------------------

CLONES = {"fp32": 1.3, "bf16": 1.6}
SPEEDS = {  # sampler -> who of ours, and how many times as fast as diffusers
    "DDIM": ("ours", {"fp32": 3.0, "bf16": 5.0}),
    "Euler": ("ours", {"fp32": 4.0, "bf16": 6.0}),
    "DPM++2M": ("ours", {"fp32": 5.0, "bf16": 10.0}),
    "UniPC": ("ours", {"fp32": 6.0, "bf16": 10.0}),
    "EulerAncestral": ("ours, philox", {"fp32": 3.5, "bf16": 5.0}),
}
ERRORS = {"DDPM": 0.6, "UniPC": 0.6, "DDIM": 0.95, "LCM": 0.95}


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises on one thread of a CPU; `results` maps case names to their records."""
    found = []
    for name, (who, times) in SPEEDS.items():
        for dtype in DTYPES:
            case = f"step/{name}-{named(LARGE)}-{dtype}"
            own, clone = (believed_ms(results, case, each)[0] for each in (who, "clone"))
            if not SAMPLERS[name].noisy:
                found.append(below(f"{case}: ours over clones of the same bytes", own and clone and own / clone, CLONES[dtype]))
            found += [faster(results, case, who, "diffusers", times[dtype]), faster(results, case, who, "compile", 1 / 1.1)]
    for name in RUNS:
        case = f"trajectory/{name}-bf16"
        errors = results.get(case, {}).get("contestants", {}).get("diffusers", {}).get("errors", {})
        ratio = 1 / errors["times_ours"] if "times_ours" in errors else None
        found.append(below(f"{case}: error over that of diffusers, mean of all lengths", ratio, ERRORS.get(name, 1.0)))
    small = [f"run/{name}-{named(shape)}" for shape in SMALL for name in SAMPLERS]
    found += [faster(results, case, who, "diffusers", 1.0) for case in small for who in ("ours", "ours, patched")]
    found += [faster(results, f"whole-run/{name}-{named(SMALL[0])}", "ours", "diffusers", 1.0) for name in SAMPLERS]
    noising = [f"noising/{name}-{named(TRAINING)}-{dtype}" for name in NOISING for dtype in DTYPES]
    return found + [faster(results, case, "ours", "diffusers", 1.0) for case in noising]
