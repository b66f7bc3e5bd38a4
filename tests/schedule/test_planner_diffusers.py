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
    named = {n: p.default for n, p in parameters.items() if n != "self" and p.kind != p.VAR_KEYWORD}
    assert list(named.items()) == list(planner.DEFAULTS[class_name].items())  # in their order


@pytest.mark.parametrize("class_name", RANDOM)
@pytest.mark.filterwarnings("ignore")
def test_random_configurations(class_name):
    """The same levels, and with them the same steps within 1e-9 of the largest number."""
    rng, steps, finite = random.Random(f"planner {class_name}"), 0, 0
    for _ in range(CASES):
        config, run = RANDOM[class_name](rng)
        scheduler = stock.prepared(class_name, config, run)
        schedule = planner.schedule(class_name, config, planner.Run(**run))
        case = f"{class_name} {config} {run}"
        assert_same_levels(case, config, run, scheduler, schedule)
        channels = SHAPE[1] * (2 if config.get("variance_type") == "learned_range" else 1)
        plan = planner.plan(class_name, config, planner.Run(**run), levels=stock.levels(scheduler, schedule))
        theirs = stock.trajectory(scheduler, run, SHAPE, channels)
        ours = plan_executor.trajectory(plan, SHAPE, channels)
        for pair in zip(ours, theirs, strict=True):
            steps += 1
            finite += same_outputs(case, *pair)
    assert finite >= 0.95 * steps


SPACED = [n for n in RANDOM if "timestep_spacing" in planner.DEFAULTS[n] and n not in ("LCMScheduler", "TCDScheduler")]


@pytest.mark.parametrize("class_name", SPACED)
@pytest.mark.filterwarnings("ignore")
def test_trailing_that_ends_in_minus_one(class_name):
    config, run = {"timestep_spacing": "trailing"}, {"num_inference_steps": 61}
    scheduler = stock.prepared(class_name, config, run)
    theirs = stock.trajectory(scheduler, run, SHAPE, SHAPE[1])
    ours = plan_executor.trajectory(planner.plan(class_name, config, planner.Run(**run)), SHAPE, SHAPE[1])
    assert len(ours) == len(scheduler.timesteps) and -1 in scheduler.timesteps.tolist()
    assert all(same_outputs(class_name, *pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_learned_variance_is_left_out():
    config, run, shape = {"variance_type": "learned_range", "solver_order": 3}, {"num_inference_steps": 6}, (1, 3, 2, 2)
    scheduler = stock.prepared("DPMSolverMultistepScheduler", config, run)
    theirs = stock.trajectory(scheduler, run, shape, channels=6)
    ours = plan_executor.trajectory(planner.plan("DPMSolverMultistepScheduler", config, planner.Run(**run)), shape, channels=6)
    assert all(same_outputs("learned_range", *pair) for pair in zip(ours, theirs, strict=True))


def assert_same_levels(case, config, run, scheduler, schedule):
    """The same numbers, but for what is read off numpy's logarithm of fp32, whose last place differs from machine to machine."""
    assert schedule.timestep_dtype == str(scheduler.timesteps.dtype).removeprefix("torch."), case
    respaced = any(
        value for option, value in config.items() if option.startswith("use_") and option.endswith(("sigmas", "lambdas"))
    )
    logarithmic = "sigmas" in run or config.get("timestep_type") == "continuous" or schedule.timestep_dtype == "float64"
    logarithmic = logarithmic or hasattr(scheduler, "sigmas_interpol")
    if respaced or logarithmic:
        # cut to a whole number, a time may fall to the other side
        within = 1 if schedule.timestep_dtype == "int64" else 2e-4
        known = [(ours, t) for ours, t in zip(schedule.timesteps, scheduler.timesteps.tolist(), strict=True) if t == t]
        assert len(known) >= 0.8 * len(schedule.timesteps), case  # KDPM2's with noise may have some that are NaN
        assert [ours for ours, _ in known] == pytest.approx([t for _, t in known], abs=within), case
    else:
        assert list(schedule.timesteps) == scheduler.timesteps.tolist(), case
    if schedule.alphas_cumprod is not None:
        assert list(schedule.alphas_cumprod) == scheduler.alphas_cumprod.tolist(), case
    elif config.get("use_lu_lambdas") or config.get("interpolation_type") == "log_linear":
        assert schedule.sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=5e-7, abs=0), case
    else:
        assert list(schedule.sigmas) == scheduler.sigmas.tolist(), case


def same_outputs(case, ours, theirs):
    """Whether diffusers' outputs are finite; that ours are then the same is asserted."""
    for (name, output), expected in zip(ours.items(), theirs, strict=False):
        if not expected.isfinite().all():
            return False
        deviation = (output - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
        assert deviation <= 1e-9, f"{case}: {name} deviates by {deviation:.1e}"
    return True
