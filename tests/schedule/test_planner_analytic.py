"""The planner against what can be computed by hand: where the model's prediction is known, a step's result is too."""

import math

import plan_executor
import pytest
import torch
from random_cases import still

from mmgen_kernels.schedule import planner

VP, EDM, FLOW = "variance preserving", "sigma space", "flow"
SPACE = {
    "DDPMScheduler": VP,
    "DDIMScheduler": VP,
    "LCMScheduler": VP,
    "TCDScheduler": VP,
    "CogVideoXDDIMScheduler": VP,
    "CogVideoXDPMScheduler": VP,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "LMSDiscreteScheduler": EDM,
    "PNDMScheduler": VP,
    "DEISMultistepScheduler": VP,
    "SASolverScheduler": VP,
    "DPMSolverSinglestepScheduler": VP,
    "HeunDiscreteScheduler": EDM,
    "EulerDiscreteScheduler": EDM,
    "EulerAncestralDiscreteScheduler": EDM,
    "DPMSolverMultistepScheduler": VP,
    "UniPCMultistepScheduler": VP,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FLOW,
}


def points(class_name, config, plan):
    """(alpha, sigma) of the sample per timestep, and where the last step leads."""
    schedule = plan.schedule
    if schedule.sigmas is None:
        apart = config.get("num_train_timesteps", 1000) // len(schedule.timesteps)
        levels = [schedule.alphas_cumprod[int(t)] for t in schedule.timesteps]
        assert schedule.timesteps[-1] < apart
        return [(math.sqrt(a), math.sqrt(1 - a)) for a in (*levels, 1.0)]
    if SPACE[class_name] == EDM:
        return [(1.0, s) for s in schedule.sigmas]
    if SPACE[class_name] == FLOW or config.get("use_flow_sigmas"):
        return [(1 - s, s) for s in schedule.sigmas]
    return [(1 / math.sqrt(s**2 + 1), s / math.sqrt(s**2 + 1)) for s in schedule.sigmas]


# The basis: what x0 is, what the noise in the sample is, what noise is drawn.
X0, Z, DRAWN = torch.eye(3, dtype=torch.float64).view(3, 1, 3)


def predicted(kind, alpha, sigma):
    """What a model that knows x0 and the noise says. In sigma space its input is scaled to a variance preserving one."""
    scale = math.hypot(alpha, sigma) if kind == "v_prediction" else 1.0
    return {
        "epsilon": Z,
        "sample": X0,
        "v_prediction": (alpha * Z - sigma * X0) / scale,
        "flow_prediction": Z - X0,
    }[kind]


def followed(class_name, config, run, *, keep):
    """Per step (prev_sample, alpha', sigma'). With `keep` a step starts where the last one led, else on the process itself."""
    plan = planner.plan(class_name, config, planner.Run(num_inference_steps=7, **run))
    kind = config.get("prediction_type", "flow_prediction" if SPACE[class_name] == FLOW else "epsilon")
    places, history, reached = points(class_name, config, plan), {}, []
    sample = places[0][0] * X0 + places[0][1] * Z
    for k in range(len(plan.rows)):
        (alpha, sigma), (to_alpha, to_sigma) = places[k : k + 2]
        if not keep:
            sample = alpha * X0 + sigma * Z
        inputs = {"sample": sample, "model_output": predicted(kind, alpha, sigma)} | history
        everything = inputs | plan_executor.step(plan, k, inputs, DRAWN)
        history = {name: everything[source] for name, source in plan.feeds_of(k).items() if source in everything}
        sample = everything["prev_sample"]
        reached.append((sample, to_alpha, to_sigma))
    return reached


VPS = ("epsilon", "sample", "v_prediction")
UNCLIPPED = {"clip_sample": False}
DETERMINISTIC = [
    *(("DDIMScheduler", UNCLIPPED | {"prediction_type": kind, "num_train_timesteps": 700}) for kind in VPS),
    *(("CogVideoXDDIMScheduler", {"prediction_type": kind, "num_train_timesteps": 700}) for kind in VPS),
    *(("EulerDiscreteScheduler", {"prediction_type": kind, "use_karras_sigmas": True}) for kind in VPS),
    *(("HeunDiscreteScheduler", {"prediction_type": kind, "use_karras_sigmas": kind == "epsilon"}) for kind in VPS),
    *(("LMSDiscreteScheduler", {"prediction_type": kind, "use_karras_sigmas": kind == "epsilon"}) for kind in VPS),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    *(("DPMSolverMultistepScheduler", {"prediction_type": kind, "solver_order": 1 + j}) for j, kind in enumerate(VPS)),
    *(
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": kind, "solver_order": 3, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        )
        for kind in VPS
    ),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_type": "heun"}),
    *(
        ("SASolverScheduler", {"prediction_type": kind, "tau_func": still, "predictor_order": 1 + j, "corrector_order": 3 - j})
        for j, kind in enumerate(VPS)
    ),
    ("SASolverScheduler", {"tau_func": still, "algorithm_type": "noise_prediction", "predictor_order": 4, "corrector_order": 4}),
    *(("DEISMultistepScheduler", {"prediction_type": kind, "solver_order": 1 + j}) for j, kind in enumerate(VPS)),
    ("DEISMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 3}),
    *(("DPMSolverSinglestepScheduler", {"prediction_type": kind, "solver_order": 1 + j}) for j, kind in enumerate(VPS)),
    *(("UniPCMultistepScheduler", {"prediction_type": kind, "solver_order": 1 + j}) for j, kind in enumerate(VPS)),
    *(
        ("UniPCMultistepScheduler", {"prediction_type": kind, "predict_x0": False, "final_sigmas_type": "sigma_min"})
        for kind in VPS
    ),
    (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 3, "solver_type": "bh1"},
    ),
]


@pytest.mark.parametrize("class_name, config", DETERMINISTIC, ids=str)
def test_a_known_x0_is_reached_on_a_straight_way(class_name, config):
    """Where x0 and the noise are constant, every deterministic solver is exact: the sample stays alpha x0 + sigma z."""
    for sample, alpha, sigma in followed(class_name, config, {}, keep=True):
        torch.testing.assert_close(sample, alpha * X0 + sigma * Z, rtol=0, atol=2e-11 * max(1.0, alpha, sigma))


STOCHASTIC = [
    *(("DDPMScheduler", UNCLIPPED | {"prediction_type": kind, "num_train_timesteps": 700}, {}) for kind in VPS),
    ("DDIMScheduler", UNCLIPPED | {"num_train_timesteps": 700}, {"eta": 0.6}),
    ("DDIMScheduler", UNCLIPPED | {"prediction_type": "v_prediction", "num_train_timesteps": 700}, {"eta": 1.0}),
    ("EulerDiscreteScheduler", {"prediction_type": "sample"}, {"s_churn": 3.0}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "heun"}, {}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, {}),
    *(("CogVideoXDPMScheduler", {"prediction_type": kind, "num_train_timesteps": 700}, {}) for kind in VPS),
]


@pytest.mark.parametrize("class_name, config, run", STOCHASTIC, ids=str)
def test_noise_that_is_drawn_replaces_noise_that_is_left(class_name, config, run):
    """Where x0 is known, a stochastic step keeps the process: alpha' of x0, and variances that add up to sigma'^2."""
    drawn = 0.0
    for sample, alpha, sigma in followed(class_name, config, run, keep=False):
        x0, left, new = sample.flatten().tolist()
        assert x0 == pytest.approx(alpha, abs=1e-12)
        assert math.hypot(left, new) == pytest.approx(sigma, rel=1e-9, abs=1e-12)
        drawn += abs(new)
    assert drawn > 0.1


def test_ddim_with_eta_1_is_ddpm():
    config = UNCLIPPED | {"num_train_timesteps": 600}
    run = {"num_inference_steps": 12}
    ddim = planner.plan("DDIMScheduler", config, planner.Run(**run, eta=1.0))
    ddpm = planner.plan("DDPMScheduler", config, planner.Run(**run))
    rows = [torch.tensor(plan.rows, dtype=torch.float64) for plan in (ddim, ddpm)]
    torch.testing.assert_close(*rows, rtol=1e-11, atol=1e-13)


def test_ddim_backwards_is_the_way_forwards():
    """A step and the same step between the same levels the other way, with the same epsilon, is nothing."""
    config = UNCLIPPED | {"num_train_timesteps": 100}
    plan = planner.plan("DDIMScheduler", config, planner.Run(num_inference_steps=10))
    levels = [plan.schedule.alphas_cumprod[int(t)] for t in plan.timesteps]
    for row, a, previous in zip(plan.rows[:-1], levels, levels[1:], strict=False):
        x, m, derived, _ = row[1]
        back_x, back_m = math.sqrt(a / previous), math.sqrt(1 - a) - math.sqrt(a / previous) * math.sqrt(1 - previous)
        assert derived == 0
        assert (back_x * x, back_x * m + back_m) == (pytest.approx(1, rel=1e-12), pytest.approx(0, abs=1e-12))


def polynomial(coefficients, at):
    return sum(c * at**j for j, c in enumerate(coefficients))


def weighed_integral(coefficients, sign, start, end):
    """int_start^end e^(sign l) p(l) dl, by parts."""

    def antiderivative(at):
        total, derivative, power = 0.0, list(coefficients), sign
        while derivative:
            total += power * polynomial(derivative, at)
            derivative = [j * c for j, c in enumerate(derivative)][1:]
            power *= -sign
        return math.exp(sign * at) * total

    return antiderivative(end) - antiderivative(start)


def exact(coefficients, predict_x0, x, start, end):
    """The flow ODE where x0 (or epsilon) is a polynomial of lambda: x / sigma (or x / alpha) grows by its weighed integral."""
    (alpha, sigma), (to_alpha, to_sigma) = start, end
    span = [math.log(a / s) for a, s in (start, end)]
    if predict_x0:
        return to_sigma * (x / sigma + weighed_integral(coefficients, 1, *span))
    return to_alpha * (x / alpha - weighed_integral(coefficients, -1, *span))


def run_into(class_name, config, coefficients, k, predict_x0):
    """Row k with an exact past: its outputs, and what is exact at its timestep and the next."""
    plan = planner.plan(class_name, config, planner.Run(num_inference_steps=8))
    places = points(class_name, config, plan)
    logs = [math.log(alpha / sigma) for alpha, sigma in places[:-1]]
    ways = [0.7]
    for start, end in zip(places[k - 1 :], places[k : k + 2], strict=False):
        ways.append(exact(coefficients, predict_x0, ways[-1], start, end))
    numbers = {"last_sample": ways[0], "sample": ways[1], "model_output": polynomial(coefficients, logs[k])}
    numbers |= {f"m{j}": polynomial(coefficients, logs[k - j]) for j in range(1, 4)}
    inputs = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in numbers.items()}
    outputs = plan_executor.step(plan, k, inputs, torch.zeros(1, 1, dtype=torch.float64))
    return {name: output.item() for name, output in outputs.items()}, ways[1], ways[2]


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_unipc_order_conditions(solver_type, predict_x0):
    """The third order's predictor is exact for polynomials of degree 2, its corrector for degree 3, the second's for degree 2."""
    config = {"solver_type": solver_type, "predict_x0": predict_x0, "final_sigmas_type": "sigma_min"}
    config |= {"prediction_type": "sample" if predict_x0 else "epsilon"}
    quadratic, cubic = (0.4, -0.3, 0.2), (0.4, -0.3, 0.2, 0.1)
    outputs, now, following = run_into("UniPCMultistepScheduler", config | {"solver_order": 3}, quadratic, 4, predict_x0)
    assert outputs["corrected"] == pytest.approx(now, rel=1e-10) and outputs["prev_sample"] == pytest.approx(following, rel=1e-10)
    outputs, now, _ = run_into("UniPCMultistepScheduler", config | {"solver_order": 3}, cubic, 4, predict_x0)
    assert outputs["corrected"] == pytest.approx(now, rel=1e-10)
    outputs, now, _ = run_into("UniPCMultistepScheduler", config | {"solver_order": 2}, quadratic, 4, predict_x0)
    assert outputs["corrected"] == pytest.approx(now, rel=1e-10)
    outputs, now, _ = run_into("UniPCMultistepScheduler", config | {"solver_order": 2}, cubic, 4, predict_x0)
    assert outputs["corrected"] != pytest.approx(now, rel=1e-4)


@pytest.mark.parametrize("algorithm_type", ["dpmsolver", "dpmsolver++"])
def test_dpmsolver_order_conditions(algorithm_type):
    """The second order in Heun's form is exact for straight lines; the midpoint's form is not."""
    plus = algorithm_type == "dpmsolver++"
    config = {
        "algorithm_type": algorithm_type,
        "final_sigmas_type": "sigma_min",
        "prediction_type": "sample" if plus else "epsilon",
    }
    outputs, _, following = run_into("DPMSolverMultistepScheduler", config | {"solver_type": "heun"}, (0.4, -0.3), 4, plus)
    assert outputs["prev_sample"] == pytest.approx(following, rel=1e-10)
    outputs, _, following = run_into("DPMSolverMultistepScheduler", config | {"solver_type": "midpoint"}, (0.4, -0.3), 4, plus)
    assert outputs["prev_sample"] != pytest.approx(following, rel=1e-4)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_ends_in_x0(solver_type):
    plan = planner.plan("UniPCMultistepScheduler", {"solver_type": solver_type}, planner.Run(num_inference_steps=5))
    assert plan.rows[-1][1] == [0.0] * len(plan.inputs) + [1.0, 0.0]


def test_ddim_where_no_signal_is_left():
    """1 - a' - s^2 is 0 there for eta 1, and must not be a rounding error's root."""
    config = UNCLIPPED | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "sample"}
    for steps in (3, 9, 11, 50):
        plan = planner.plan("DDIMScheduler", config, planner.Run(num_inference_steps=steps, eta=1.0))
        assert plan.rows[0][1][0] == 0 and all(math.isfinite(c) for row in plan.rows for line in row for c in line)


@pytest.mark.parametrize("respacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("class_name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_respaced_levels_keep_their_ends(class_name, respacing):
    ends = {} if class_name.startswith("DPM") else {"sigma_min": 0.02, "sigma_max": 20.0}
    run = planner.Run(num_inference_steps=9)
    even = planner.schedule(class_name, {"timestep_spacing": "linspace"}, run).sigmas
    respaced = planner.schedule(class_name, ends | {respacing: True}, run).sigmas
    assert len(respaced) == 10 and list(respaced) == sorted(respaced, reverse=True) and respaced[-1] == 0
    assert respaced[0] == pytest.approx(ends.get("sigma_max", even[0]), rel=1e-6)
    # sqrt(beta / (1 - beta)), and 1 - beta is held in fp32
    assert respaced[8] == pytest.approx(ends.get("sigma_min", math.sqrt(1e-4 / (1 - 1e-4))), rel=2e-4)
