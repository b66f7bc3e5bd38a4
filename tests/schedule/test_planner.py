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


def assert_whole(plan):
    """What the operator that applies a plan relies on."""
    n, steps = len(plan.inputs), len(plan.timesteps)
    assert 1 <= len(plan.outputs) <= 3 and plan.outputs[0] == "prev_sample"
    assert all(sum(any(line[j] != 0 for line in row) for j in range(n)) <= 7 for row in plan.rows)
    assert [[len(line) for line in row] for row in plan.rows] == [[n + 2] * (1 + len(plan.outputs))] * steps
    assert all(row[0][n] == 0 for row in plan.rows)  # derived is no term of itself
    assert len(plan.draws_noise) == len(plan.scale_model_input) == steps
    for row, drawn in zip(plan.rows, plan.draws_noise, strict=True):
        assert drawn or all(line[n + 1] == 0 for line in row)
    for k in range(steps):
        assert set(plan.feeds_of(k)) == set(plan.inputs) - {"sample", "model_output"}
        assert set(plan.feeds_of(k).values()) <= {*plan.inputs, *plan.outputs, "noise"}


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_trajectory(record):
    plan = planner.plan(record["class"], record["config"], planner.Run(**record["run"]), levels=levels_of(record))
    assert_whole(plan)
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


FIVE = {"num_inference_steps": 5}
TRAILING = {"timestep_spacing": "trailing"}
DPM, UNIPC, FLOW = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
DEIS, SINGLE, SA = "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"
REFUSED = [
    ("IPNDMScheduler", {}, FIVE, "class_name"),
    ("DDIMScheduler", {}, {}, "num_inference_steps"),
    ("DDIMScheduler", {}, {"num_inference_steps": 0}, "num_inference_steps"),
    ("DDIMScheduler", {}, {"num_inference_steps": 1001}, "num_inference_steps"),
    ("DDIMScheduler", {}, FIVE | {"begin": 5}, "begin"),
    ("DDIMScheduler", {}, FIVE | {"s_churn": 1.0}, "s_churn"),
    ("DDIMScheduler", {}, {"timesteps": [3, 1]}, "timesteps"),
    ("DDIMScheduler", {"beta_schedule": "sigmoid"}, FIVE, "beta_schedule"),
    ("DDIMScheduler", {"timestep_spacing": "log"}, FIVE, "timestep_spacing"),
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}, FIVE, "prediction_type"),
    ("DDIMScheduler", {"steps_offset": 300}, FIVE, "steps_offset"),
    ("DDIMScheduler", TRAILING | {"rescale_betas_zero_snr": True}, FIVE, "rescale_betas_zero_snr"),
    ("DDPMScheduler", TRAILING | {"rescale_betas_zero_snr": True}, FIVE, "rescale_betas_zero_snr"),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, FIVE, "variance_type"),
    ("DDPMScheduler", {"variance_type": "learned"}, FIVE, "variance_type"),
    ("DDPMScheduler", {}, {"timesteps": [1, 3]}, "timesteps"),
    ("DDPMScheduler", {}, {"timesteps": [1000, 3]}, "timesteps"),
    ("DDPMScheduler", {}, FIVE | {"timesteps": [3, 1]}, "num_inference_steps"),
    ("EulerDiscreteScheduler", {}, FIVE | {"timesteps": [3, 1]}, "num_inference_steps"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, {"timesteps": [3, 1]}, "timesteps"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "use_karras_sigmas": True}, FIVE, "use_karras_sigmas"),
    ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, FIVE, "interpolation_type"),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "last"}, FIVE, "final_sigmas_type"),
    ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, FIVE, "prediction_type"),
    ("EulerDiscreteScheduler", {}, FIVE | {"eta": 1.0}, "eta"),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, FIVE, "prediction_type"),
    ("EulerAncestralDiscreteScheduler", {}, {}, "num_inference_steps"),
    ("DDIMInverseScheduler", {"timestep_spacing": "linspace"}, FIVE, "timestep_spacing"),
    ("PNDMScheduler", {}, {"num_inference_steps": 3}, "num_inference_steps"),
    ("PNDMScheduler", {"prediction_type": "sample"}, FIVE, "prediction_type"),
    ("PNDMScheduler", {}, FIVE | {"method": "plms", "kept": 2}, "kept|outputs of prk"),
    ("PNDMScheduler", {}, FIVE | {"method": "prk", "counter": 12, "begin": 3}, "counter"),
    ("LMSDiscreteScheduler", {}, FIVE | {"order": 5}, "order"),
    ("LMSDiscreteScheduler", {"prediction_type": "flow_prediction"}, FIVE, "prediction_type"),
    ("HeunDiscreteScheduler", {}, FIVE | {"timesteps": [3, 1]}, "num_inference_steps"),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, {"timesteps": [3, 1]}, "timesteps"),
    ("HeunDiscreteScheduler", {"beta_schedule": "laplace"}, FIVE, "beta_schedule"),
    ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, FIVE, "prediction_type"),
    ("KDPM2AncestralDiscreteScheduler", {"prediction_type": "sample"}, FIVE, "prediction_type"),
    ("KDPM2DiscreteScheduler", {}, {"timesteps": [3, 1]}, "timesteps"),
    ("EDMEulerScheduler", {"sigma_schedule": "linear"}, FIVE, "sigma_schedule"),
    ("EDMEulerScheduler", {"prediction_type": "sample"}, FIVE, "prediction_type"),
    ("EDMEulerScheduler", {}, FIVE | {"sigmas": [0.0, 1.0]}, "num_inference_steps"),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, FIVE, "algorithm_type"),
    ("EDMDPMSolverMultistepScheduler", {"solver_type": "ralston"}, FIVE, "solver_type"),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, FIVE, "solver_order"),
    ("EDMDPMSolverMultistepScheduler", {}, {}, "num_inference_steps"),
    ("CMStochasticIterativeScheduler", {}, {"num_inference_steps": 41}, "num_inference_steps"),
    ("CMStochasticIterativeScheduler", {}, {"timesteps": [40, 3]}, "timesteps"),
    ("CMStochasticIterativeScheduler", {}, {"timesteps": [3, 3]}, "timesteps"),
    ("LCMScheduler", {}, {"num_inference_steps": 51}, "num_inference_steps"),
    ("LCMScheduler", {}, {"num_inference_steps": 30, "strength": 0.5}, "strength"),
    ("LCMScheduler", {}, FIVE | {"original_inference_steps": 1001}, "original_inference_steps"),
    ("LCMScheduler", {"prediction_type": "flow_prediction"}, FIVE, "prediction_type"),
    (DPM, {}, FIVE | {"timesteps": [3, 1]}, "num_inference_steps"),
    (DPM, {"use_lu_lambdas": True}, {"timesteps": [3, 1]}, "use_lu_lambdas"),
    (DPM, {"use_flow_sigmas": True}, {"timesteps": [3, 1]}, "use_flow_sigmas"),
    (DPM, {}, FIVE | {"mu": 1.0}, "use_dynamic_shifting"),
    (DPM, {"algorithm_type": "dpmsolver"}, FIVE, "final_sigmas_type"),
    (DPM, {"algorithm_type": "euler"}, FIVE, "algorithm_type"),
    (DPM, {"solver_type": "ralston"}, FIVE, "solver_type"),
    (
        DPM,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "prediction_type": "flow_prediction"},
        FIVE,
        "prediction_type",
    ),
    (DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}, FIVE, "solver_order"),
    (UNIPC, {"solver_order": 4}, FIVE, "solver_order"),
    (UNIPC, {"solver_type": "bh3"}, FIVE, "solver_type"),
    (UNIPC, {"solver_p": object()}, FIVE, "solver_p"),
    (UNIPC, {"use_dynamic_shifting": True}, FIVE, "mu"),
    (UNIPC, {"shift_terminal": 0.1}, FIVE, "shift_terminal"),
    (UNIPC, {}, {"sigmas": [0.9, 0.1]}, "use_flow_sigmas"),
    (UNIPC, {"use_flow_sigmas": True}, FIVE | {"sigmas": [0.9, 0.1]}, "num_inference_steps"),
    (UNIPC, {"predict_x0": False, "prediction_type": "flow_prediction"}, FIVE, "prediction_type"),
    (SINGLE, {}, FIVE | {"timesteps": [3, 1]}, "num_inference_steps"),
    (SINGLE, {"use_beta_sigmas": True}, {"timesteps": [3, 1]}, "use_beta_sigmas"),
    (SINGLE, {"solver_order": 4}, FIVE, "solver_order"),
    (SINGLE, {"solver_type": "ralston"}, FIVE, "solver_type"),
    (SINGLE, {"algorithm_type": "sde-dpmsolver"}, FIVE, "algorithm_type"),
    (SINGLE, {"algorithm_type": "dpmsolver"}, FIVE, "final_sigmas_type"),
    (SINGLE, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True}, FIVE, "thresholding"),
    (DEIS, {}, {}, "num_inference_steps"),
    (DEIS, {}, FIVE | {"mu": 1.0}, "use_dynamic_shifting"),
    (DEIS, {"algorithm_type": "unipc"}, FIVE, "algorithm_type"),
    (DEIS, {"solver_type": "ralston"}, FIVE, "solver_type"),
    (DEIS, {"prediction_type": "x0"}, FIVE, "prediction_type"),
    (SA, {}, {}, "num_inference_steps"),
    (SA, {"predictor_order": 5}, FIVE, "predictor_order"),
    (SA, {"corrector_order": 0}, FIVE, "corrector_order"),
    (SA, {"algorithm_type": "dpmsolver"}, FIVE, "algorithm_type"),
    (SA, {"algorithm_type": "noise_prediction", "thresholding": True}, FIVE, "thresholding"),
    (SA, {"algorithm_type": "noise_prediction", "prediction_type": "flow_prediction"}, FIVE, "prediction_type"),
    ("TCDScheduler", {}, FIVE | {"eta": 1.5}, "eta"),
    ("TCDScheduler", {}, {"num_inference_steps": 51}, "num_inference_steps"),
    ("CogVideoXDDIMScheduler", {}, {}, "num_inference_steps"),
    ("CogVideoXDDIMScheduler", {}, FIVE | {"eta": 1.0}, "eta"),
    ("CogVideoXDDIMScheduler", TRAILING | {"rescale_betas_zero_snr": True}, FIVE, "rescale_betas_zero_snr"),
    (FLOW, {}, {}, "num_inference_steps"),
    (FLOW, {}, FIVE | {"sigmas": [0.9, 0.1]}, "length"),
    (FLOW, {"use_dynamic_shifting": True}, FIVE, "mu"),
    (FLOW, {"use_dynamic_shifting": True, "time_shift_type": "cubic"}, FIVE | {"mu": 1.0}, "time_shift_type"),
    (FLOW, {}, FIVE | {"per_token_timesteps": [[1.0, 2.0]]}, "per_token_timesteps"),
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
