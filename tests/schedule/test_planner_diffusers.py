"""The planner against diffusers itself, where it is installed: hundreds of random configurations per class, in fp64."""

import inspect
import random

import plan_executor
import pytest
import stock
from random_cases import RANDOM

from mmgen_kernels.schedule import planner

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("scipy")  # diffusers' beta sigmas

CASES, SHAPE = 200, (1, 2, 2, 2)


def test_every_class_is_tried():
    assert set(RANDOM) == set(planner.CLASSES)


@pytest.mark.parametrize("class_name", planner.CLASSES)
def test_defaults(class_name):
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    assert {n: p.default for n, p in parameters.items() if n != "self"} == planner.DEFAULTS[class_name]


@pytest.mark.parametrize("class_name", RANDOM)
@pytest.mark.filterwarnings("ignore")
def test_random_configurations(class_name):
    """Levels: the same fp32 numbers, but for numpy's fp32 logarithm. Steps, with those levels: 1e-9 of the largest number."""
    rng, finite, exact = random.Random(f"planner {class_name}"), 0, 0
    for _ in range(CASES):
        config, run = RANDOM[class_name](rng)
        scheduler = stock.prepared(class_name, config, run)
        schedule = planner.schedule(class_name, config, planner.Run(**run))
        case = f"{class_name} {config} {run}"
        exact += same_levels(case, scheduler, schedule)
        channels = SHAPE[1] * (2 if config.get("variance_type") == "learned_range" else 1)
        plan = planner.plan(class_name, config, planner.Run(**run), levels=stock.levels(scheduler, schedule))
        theirs = stock.trajectory(scheduler, run, SHAPE, channels)
        ours = plan_executor.trajectory(plan, SHAPE, channels)
        assert len(ours) == len(theirs), case
        finite += all(same_outputs(case, *pair) for pair in zip(ours, theirs, strict=True))
    assert finite >= 0.95 * CASES and exact >= 0.95 * CASES


def same_levels(case, scheduler, schedule):
    """Whether every level and every whole timestep is the same number; that they are within 4 last places of fp32 is asserted."""
    assert schedule.timestep_dtype == str(scheduler.timesteps.dtype).removeprefix("torch."), case
    times, own = scheduler.timesteps.tolist(), list(schedule.timesteps)
    # a time read off a logarithm of fp32, then cut to a whole number, may fall to the other side
    assert own == pytest.approx(times, abs=1 if schedule.timestep_dtype == "int64" else 2e-4), case
    whole = schedule.timestep_dtype == "float32" or own == times
    if schedule.alphas_cumprod is not None:
        return whole and list(schedule.alphas_cumprod) == scheduler.alphas_cumprod.tolist()
    sigmas = scheduler.sigmas.tolist()
    assert schedule.sigmas == pytest.approx(sigmas, rel=5e-7, abs=0, nan_ok=True), case
    return whole and list(schedule.sigmas) == sigmas


def same_outputs(case, ours, theirs):
    """Whether diffusers' outputs are finite; that ours are then the same is asserted."""
    for (name, output), expected in zip(ours.items(), theirs, strict=False):
        if not expected.isfinite().all():
            return False
        deviation = (output - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
        assert deviation <= 1e-9, f"{case}: {name} deviates by {deviation:.1e}"
    return True
