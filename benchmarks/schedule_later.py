"""Steps of the further samplers: one in the middle of a run of large samples, and whole runs of small ones.

"step" enters its run after the K steps before it, which each contestant has made itself; the errors are those of all of them. A
sampler that evaluates the model twice for a step is timed over both. "clone", "run" and the contestants are as in
benchmarks/schedule.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import Bar, faster
from benchmarks.harness import Case
from benchmarks.peers import samplers
from benchmarks.peers.samplers import FURTHER, Sampler
from benchmarks.schedule import DTYPES, LARGE, SEED, SMALL, TOLERANCES, Make, clones, draws, error_of, named, patched, racing

QUIET_SECONDS = 0.0  # as in benchmarks/schedule.py, and so is the next
KEEPS_FREED_MEMORY = True
QUICK = ("step/TCD-8x16x128x128-bf16", "run/DEIS-1x16x7")
STEPS, K = 20, 10
LATER = {name: sampler for name, sampler in FURTHER.items() if name != "PNDM-prk"}  # a class each
EVALUATIONS = dict.fromkeys(("Heun", "KDPM2", "KDPM2Ancestral", "DPM++2S", "FlowMatchHeun"), 2)  # of the model, for a step


class Midway:
    """A scheduler in its run, which it goes back to before each call, and the sample that it had there."""

    def __init__(self, scheduler: Any, sampler: Sampler, x: Tensor, output: Tensor, steps: int):
        self.scheduler, self.told, self.last = scheduler, sampler.class_name == "CogVideoXDPMScheduler", {}
        scheduler.set_timesteps(STEPS, device=x.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        scheduler.is_scale_input_called = True
        self.times = list(scheduler.timesteps)
        if self.told:
            self.last = {"old_pred_original_sample": None, "timestep_back": None}
        with torch.no_grad():
            for t in self.times[:steps]:
                x = self.forward(scheduler.step, output, t, x)[0]
        self.x, self.told_then = x, dict(self.last)
        self.then = {name: list(v) if isinstance(v, list) else v for name, v in vars(scheduler).items()}

    def forward(self, step: Callable, output: Tensor, t: Tensor, x: Tensor) -> Any:
        """A step, and what the caller of one class must tell the next."""
        if not self.told:
            return step(output, t, x, return_dict=False)
        results = step(output, timestep=t, sample=x, **self.last, return_dict=False)
        self.last = {"old_pred_original_sample": results[1], "timestep_back": t}
        return results

    def back(self) -> None:
        self.last = dict(self.told_then)
        vars(self.scheduler).update({name: list(v) if isinstance(v, list) else v for name, v in self.then.items()})


def from_midway(of: Callable[[Sampler], Any], sampler: Sampler, begin: int, count: int, compiled: bool = False) -> Make:
    """`make` of a contestant whose call is steps `begin` to `begin + count`; the first call after it has the noise of SEED."""

    def make(sample: Tensor, output: Tensor) -> Callable[[], Any]:
        torch.manual_seed(SEED)
        midway = Midway(of(sampler), sampler, sample, output, begin)
        times, step = midway.times[begin : begin + count], midway.scheduler.step
        if compiled:
            torch._dynamo.reset()
            step = torch.compile(step, dynamic=False, options={"fallback_random": True})

        @torch.no_grad()
        def call() -> Any:
            midway.back()
            results: Any = (midway.x,)
            for t in times:
                results = midway.forward(step, output, t, results[0])
            return results

        torch.manual_seed(SEED)
        return call

    return make


def step_case(name: str, dtype: str, device: torch.device) -> Case:
    import mmgen_kernels as mk

    sampler, count, truth = LATER[name], EVALUATIONS.get(name, 1), []
    numel = torch.Size(LARGE).numel()
    moved = count * (sampler.reads + sampler.writes) * numel * DTYPES[dtype].itemsize
    if sampler.wide_data:
        moved += numel * (4 - DTYPES[dtype].itemsize)

    def exact(given: tuple[Tensor, ...]) -> list[Tensor]:
        """In fp64 and by the reference, with the noise that the contestants have."""

        def make(sampler: Sampler) -> Any:
            scheduler, drawn = samplers.ours(sampler), torch.float32 if sampler.wide_noise else given[0].dtype
            scheduler.stepper.draw = lambda _, like, *__: torch.randn(like.shape, dtype=drawn, device=like.device).double()
            return scheduler

        with mk.use_backend("reference"):
            return list(from_midway(make, sampler, K, count)(*(t.double() for t in given))())

    def judge(contestant: Any, given: tuple, output: Any) -> dict:
        if contestant.name == "clone":
            return {"error": 0.0}
        if not truth:
            truth.extend(exact(given))
        return {"error": error_of(output, truth)}

    makes = {who: from_midway(of, sampler, K, count) for who, of in LIBRARIES.items()}
    makes |= {"compile": from_midway(samplers.stock, sampler, K, count, compiled=True), "clone": clones(moved)}
    return Case(
        name=f"step/{name}-{named(LARGE)}-{dtype}",
        group="step",
        contestants=racing(makes),
        inputs=lambda tiny: {"data": draws((1, 4, 8, 8) if tiny else LARGE, DTYPES[dtype], device, 2)},
        judge=judge,
        flops=8.0 * count * numel,
        bytes=float(moved),
        limit="copy_gb_s",
        dims={"B": LARGE[0], "elements": numel},
        tolerance=TOLERANCES[dtype],
        note=f"{count} of {STEPS} steps{', noise' if sampler.noisy else ''}",
    )


def run_case(name: str, shape: tuple[int, ...], device: torch.device) -> Case:
    sampler, numel = LATER[name], torch.Size(shape).numel()
    libraries = LIBRARIES | ({"ours, philox": partial(samplers.ours, noise="philox")} if sampler.noisy else {})
    return Case(
        name=f"run/{name}-{named(shape)}",
        group="run",
        contestants=racing({who: from_midway(of, sampler, 0, STEPS) for who, of in libraries.items()}),
        inputs=lambda tiny: {"data": draws(shape, torch.float32, device, 2)},
        judge=lambda contestant, given, output: {"error": 0.0 if bool(output[0].isfinite().all()) else torch.inf},
        flops=8.0 * STEPS * numel,
        bytes=4.0 * STEPS * (sampler.reads + sampler.writes) * numel,
        limit="copy_gb_s",
        dims={"B": shape[0], "elements": numel},
        tolerance=0.0,  # the errors are those of the other group; a run that ends in NaN does not count
        note=f"{STEPS} steps",
    )


LIBRARIES = {"ours": samplers.ours, "ours, patched": patched, "diffusers": samplers.stock}


def cases(device: torch.device) -> list[Case]:
    found = [step_case(name, dtype, device) for name in LATER for dtype in DTYPES]
    return found + [run_case(name, SMALL[1], device) for name in LATER]


# -- bars -------------------------------------------------------------------------------------------------------------


def bars(results: dict[str, dict]) -> list[Bar]:
    """On one thread of a CPU: never slower than diffusers, and with large samples hardly slower than its compiled steps."""
    found = []
    for name in LATER:
        for dtype in DTYPES:
            case = f"step/{name}-{named(LARGE)}-{dtype}"
            found += [faster(results, case, "ours", "diffusers", 1.0), faster(results, case, "ours, patched", "diffusers", 1.0)]
            found.append(faster(results, case, "ours", "compile", 1 / 1.1))
        case = f"run/{name}-{named(SMALL[1])}"
        found += [faster(results, case, who, "diffusers", 1.0) for who in ("ours", "ours, patched")]
    return found
