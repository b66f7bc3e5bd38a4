"""The planner against recorded runs of diffusers, and what it refuses."""

import dataclasses
import json
import math
from pathlib import Path

import plan_executor
import pytest
import torch
from recorded_cases import CASES, SHAPE

from mmgen_kernels.schedule import planner

RECORDS = json.loads(Path(__file__).with_name("recorded_trajectories.json").read_text())["trajectories"]


def name(record):
    return f"{record['class']} {record['config']} {record['run']}"


def planned(record):
    return planner.schedule(record["class"], record["config"], planner.Run(**record["run"]))


def levels_of(record):
    """The recorded levels: another machine's fp32 sums and logarithms may differ in the last place."""
    schedule = planned(record)
    if record["alphas_cumprod"] is None:
        return dataclasses.replace(schedule, sigmas=tuple(record["sigmas"]), init_noise_sigma=record["init_noise_sigma"])
    table = list(schedule.alphas_cumprod)
    for t, value in record["alphas_cumprod"].items():
        table[int(t)] = value
    return dataclasses.replace(schedule, alphas_cumprod=tuple(table))


def test_every_case_is_recorded():
    assert [(r["class"], r["config"], r["run"]) for r in RECORDS] == [(c, *case) for c, cases in CASES.items() for case in cases]
    assert set(CASES) == set(planner.CLASSES)


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_levels(record):
    schedule = planned(record)
    assert schedule.timestep_dtype == record["timestep_dtype"]
    assert schedule.timesteps == pytest.approx(record["timesteps"], rel=1e-6, abs=1e-3)
    if record["alphas_cumprod"] is None:
        assert schedule.sigmas == pytest.approx(record["sigmas"], rel=5e-7, abs=0)
    else:
        for t, value in record["alphas_cumprod"].items():
            assert schedule.alphas_cumprod[int(t)] == pytest.approx(value, rel=5e-6, abs=0)
    assert schedule.init_noise_sigma == pytest.approx(record["init_noise_sigma"], rel=5e-7)


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_trajectory(record):
    plan = planner.plan(record["class"], record["config"], planner.Run(**record["run"]), levels=levels_of(record))
    assert len(plan.inputs) <= 6 and len(plan.outputs) <= 3
    channels = SHAPE[1] * (2 if plan.log_variance is not None else 1)
    steps = plan_executor.trajectory(plan, SHAPE, channels)
    assert len(steps) == len(record["steps"]) == len(plan.timesteps)
    for ours, theirs in zip(steps, record["steps"], strict=True):
        for output, recorded in zip(ours.values(), theirs, strict=False):
            expected = torch.tensor([float(x) for x in recorded], dtype=torch.float64).view(SHAPE)
            assert (output - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("class_name", planner.CLASSES)
def test_defaults_are_filled_in_and_the_unknown_is_dropped(class_name):
    config = {"_class_name": class_name, "num_train_timesteps": 50, "of_another_scheduler": 3}
    complete = planner.complete(class_name, config)
    assert complete == planner.DEFAULTS[class_name] | {"num_train_timesteps": 50}
    assert complete is not planner.DEFAULTS[class_name]


REFUSED = [
    ("PNDMScheduler", {}, {"num_inference_steps": 5}, "class_name"),
    ("DDIMScheduler", {}, {}, "num_inference_steps"),
    ("DDIMScheduler", {}, {"num_inference_steps": 0}, "num_inference_steps"),
    ("DDIMScheduler", {}, {"num_inference_steps": 1001}, "num_inference_steps"),
    ("DDIMScheduler", {}, {"num_inference_steps": 5, "begin": 5}, "begin"),
    ("DDIMScheduler", {}, {"num_inference_steps": 5, "s_churn": 1.0}, "s_churn"),
    ("DDIMScheduler", {}, {"timesteps": [3, 1]}, "timesteps"),
    ("DDIMScheduler", {"beta_schedule": "sigmoid"}, {"num_inference_steps": 5}, "beta_schedule"),
    ("DDIMScheduler", {"timestep_spacing": "log"}, {"num_inference_steps": 5}, "timestep_spacing"),
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}, {"num_inference_steps": 5}, "prediction_type"),
    ("DDIMScheduler", {"steps_offset": 300}, {"num_inference_steps": 5}, "steps_offset"),
    (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"num_inference_steps": 5},
        "rescale_betas_zero_snr",
    ),
    ("EulerDiscreteScheduler", {}, {"num_inference_steps": 5, "timesteps": [3, 1]}, "num_inference_steps"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, {"timesteps": [3, 1]}, "timesteps"),
    (
        "EulerDiscreteScheduler",
        {"use_beta_sigmas": True, "use_karras_sigmas": True},
        {"num_inference_steps": 5},
        "use_karras_sigmas",
    ),
    ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, {"num_inference_steps": 5}, "interpolation_type"),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "last"}, {"num_inference_steps": 5}, "final_sigmas_type"),
    ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, {"num_inference_steps": 5}, "prediction_type"),
    ("EulerDiscreteScheduler", {}, {"num_inference_steps": 5, "eta": 1.0}, "eta"),
]


@pytest.mark.parametrize("class_name, config, run, named", REFUSED, ids=str)
def test_refused(class_name, config, run, named):
    with pytest.raises(ValueError, match=named):
        planner.plan(class_name, config, planner.Run(**run))


def test_levels_must_have_what_the_class_steps_in():
    ddim, euler = ("DDIMScheduler", "EulerDiscreteScheduler")
    run = planner.Run(num_inference_steps=3)
    with pytest.raises(ValueError, match="alphas_cumprod"):
        planner.plan(ddim, {}, run, levels=planner.schedule(euler, {}, run))
    with pytest.raises(ValueError, match="sigma"):
        planner.plan(euler, {}, run, levels=planner.schedule(ddim, {}, run))


def test_begin_is_the_same_run_entered_later():
    whole = planner.plan("EulerDiscreteScheduler", {}, planner.Run(num_inference_steps=6))
    late = planner.plan("EulerDiscreteScheduler", {}, planner.Run(num_inference_steps=6, begin=4))
    assert late.rows == whole.rows[4:] and late.timesteps == whole.timesteps[4:] and late.schedule == whole.schedule


def test_a_default_device_is_not_planned_on():
    with torch.device("meta"):
        plan = planner.plan("EulerDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}, planner.Run(num_inference_steps=3))
    assert all(math.isfinite(c) for row in plan.rows for line in row for c in line)
