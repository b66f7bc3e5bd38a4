"""Races contestants on one case, and lets no time stand without its error.

A family (`benchmarks/<family>.py`) declares `cases(device)`, the names in `QUICK` (`QUICK_CUDA` where a GPU has others) and its
`bars(results)`; all else is common. Within a case all contestants take turns, one timed call each per round, and every round
starts with another one: drifting clocks and noisy neighbours then hit everybody alike, and medians with quartiles can be compared.
Before the race each contestant's output is judged against fp64; the machine's limits are measured around it.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks import limits, machine, memory

# A turn shorter than this is preceded by an untimed call, so that the caches hold this contestant's data and its
# threads are awake. Longer ones gain nothing: an 8 ms lookup takes as long right after a rival's call as after its own.
SETTLE_BELOW_SECONDS = 0.01
# Scratch that a contestant declares may take this share of the free memory; beyond it the contestant is skipped.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Contestant:
    """One way to do the work. `make(*inputs)` does what a user does once and returns the call that is timed."""

    name: str
    make: Callable[..., Callable[[], object]]
    requires: str = ""  # the module that must be installed
    devices: tuple[str, ...] = ("cpu", "cuda")
    scratch: float = 0.0  # bytes per unit of `Case.scratch_units`, to skip what would not fit in memory
    compiles: bool = False  # its first call compiles, so its memory is read at the second
    exact: bool = False  # claims no error at all: one wrong result and its time does not count
    inputs: str = "data"  # which of the case's inputs it is given
    settings: Mapping[str, object] = field(default_factory=dict)  # passed to the judge


@dataclass(frozen=True)
class Case:
    """One race: inputs, who runs, and how an output is judged."""

    name: str
    group: str  # the table that it belongs to
    contestants: Sequence[Contestant]
    inputs: Callable[[bool], dict[str, tuple]]  # tiny -> {"data": (tensors...)}; seeded, so the same in every process
    judge: Callable[[Contestant, tuple, object], dict]  # {"rows": checked, "wrong": ...} or {"error": relative}
    flops: float
    bytes: float
    limit: str  # the key of `limits.measure` that bounds it
    scratch_units: float = 0.0
    dims: Mapping[str, int] = field(default_factory=dict)
    tolerance: float | None = None  # relative error beyond which a time does not count
    note: str = ""


@dataclass(frozen=True)
class Settings:
    seconds: float = 10.0  # of timed work per case, if `min_rounds` leave room
    min_rounds: int = 7
    max_rounds: int = 60
    memory: bool = True
    # Before each turn: idle threads of the contestant before spin on (OpenBLAS 2^26 cycles, Intel's OpenMP 200 ms) and take a
    # core from the next one, which on two cores doubled its time.
    quiet_seconds: float = 0.3


def rounds_order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: everybody once, beginning one further than the round before."""
    shift = round_index % len(names)
    return [*names[shift:], *names[:shift]]


def race(
    calls: Mapping[str, Callable[[], float]],
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Interleaved timings in seconds. `calls` maps a name to a function that runs once and returns its own duration."""
    names = list(calls)
    timings: dict[str, list[float]] = {name: [] for name in names}
    latest = {name: 0.0 for name in names}
    spent, index = 0.0, 0
    while names and (index < settings.min_rounds or (spent < settings.seconds and index < settings.max_rounds)):
        for name in rounds_order(names, index):
            progress(f"round {index + 1} {name}")
            time.sleep(settings.quiet_seconds)
            if latest[name] < SETTLE_BELOW_SECONDS:
                calls[name]()
            latest[name] = calls[name]()
            timings[name].append(latest[name])
            spent += latest[name]
        index += 1
    return timings


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, interpolated between order statistics; one value stands for all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def cpu_timer(call: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def cuda_timer(call: Callable[[], object]) -> tuple[Callable[[], float], str]:
    """A captured graph between two events, or the bare call where it cannot be captured; says which.

    A buffer twice the size of L2 is cleared before each call: inputs then come from memory as they do in a model, and
    while it is being cleared the launch is queued, so the events do not time the launch itself.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
    run, mode = call, "events"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run, mode = graph.replay, "graph"
    except RuntimeError:  # a host sync inside, which capture forbids
        torch.cuda.synchronize()

    def timed() -> float:
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed, mode


def reason_against(contestant: Contestant, case: Case, device: torch.device) -> str | None:
    """Why this contestant cannot run this case, or None."""
    if device.type not in contestant.devices:
        return f"runs on {' and '.join(contestant.devices)} only"
    if contestant.requires and importlib.util.find_spec(contestant.requires) is None:
        return f"{contestant.requires} is not installed"
    needed, free = contestant.scratch * case.scratch_units, machine.free_memory(device)
    if needed > MEMORY_SHARE * free:
        return f"needs {needed / 2**30:.0f} GiB of scratch, and {free / 2**30:.0f} GiB are free"
    return None


def verdict(contestant: Contestant, case: Case, errors: Mapping[str, float]) -> str | None:
    """Why a time must not be believed, or None. A speed is never reported on a wrong result."""
    if contestant.exact and errors.get("wrong", 0):
        return f"claims to be exact and has {errors['wrong']} wrong of {errors['rows']}"
    # written so that a NaN fails
    if case.tolerance is not None and not errors.get("error", 0.0) <= case.tolerance:
        return f"relative error {errors['error']:.1e} is above {case.tolerance:.0e}"
    return None


def _enter(contestant: Contestant, case: Case, given: tuple, device: torch.device) -> tuple[dict, Callable | None]:
    """Judges one contestant before the race: its record so far, and the function that times one call of it."""
    reason = reason_against(contestant, case, device)
    if reason is not None:
        return {"skipped": reason}, None
    try:
        call = contestant.make(*given)
        output = call()
    except Exception as error:  # a rival that fails on a shape is a result too, and must not end the run
        return {"skipped": " ".join(f"{type(error).__name__}: {error}".split())[:200]}, None
    errors = case.judge(contestant, given, output)
    record = {"errors": errors}
    refusal = verdict(contestant, case, errors)
    if refusal is not None:
        record["refused"] = refusal
    del output
    if device.type == "cpu":
        return record, cpu_timer(call)
    timer, record["timer"] = cuda_timer(call)
    return record, timer


def run_case(
    case: Case, device: torch.device, settings: Settings, family: str, progress: Callable[[str], None]
) -> dict:
    """One case's record, as it stands in the results file."""
    inputs = case.inputs(False)
    records: dict[str, dict] = {}
    timers: dict[str, Callable[[], float]] = {}
    for contestant in case.contestants:
        progress(f"check {contestant.name}")
        records[contestant.name], timer = _enter(contestant, case, inputs[contestant.inputs], device)
        if timer is not None:
            timers[contestant.name] = timer

    progress("limits")
    bounds = limits.measure(device, torch.get_num_threads())
    timings = race(timers, settings, progress)
    bounds = limits.highest(bounds, limits.measure(device, torch.get_num_threads()))
    for name, seconds in timings.items():
        low, middle, high = quartiles(seconds)
        records[name] |= {
            "ms": [round(value * 1e3, 5) for value in (low, middle, high)],
            "rounds": len(seconds),
            "share_of_limit": round(work_rate(case, middle) / bounds[case.limit], 4),
        }
    del timers, inputs  # memory is measured with nothing else alive
    for contestant in case.contestants if settings.memory else ():
        if contestant.name in timings:
            progress(f"memory {contestant.name}")
            records[contestant.name] |= memory.extra_bytes(family, case, contestant, device)
    return {
        "group": case.group,
        "dims": dict(case.dims),
        "note": case.note,
        "flops": case.flops,
        "bytes": case.bytes,
        "limit": case.limit,
        "limits": bounds,
        "contestants": records,
    }


def work_rate(case: Case, seconds: float) -> float:
    """In the unit of the case's limit: GFLOP/s, or GB/s where the limit is a copy."""
    return (case.bytes if case.limit == "copy_gb_s" else case.flops) / seconds / 1e9
