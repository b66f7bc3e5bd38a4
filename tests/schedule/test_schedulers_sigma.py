"""What the classes in sigma space have of their own: two evaluations for a step, a multistep method, a step handed its x0."""

import copy
import pickle

import pytest
import torch
from plan_executor import image
from test_schedulers import NOISY, made, sampled

import mmgen_kernels as mk
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.schedule.planner import DEFAULTS
from mmgen_kernels.schedule.schedulers.stepper import Unplanned


def test_edm_takes_a_predicted_x0():
    """Behind return_dict, where diffusers has it; the model's output then says no more than a dtype."""
    scheduler = made("EDMEulerScheduler")
    scheduler.set_timesteps(6)
    t, x, x0 = scheduler.timesteps[2], image(3, (1, 2, 3)).float(), image(4, (1, 2, 3)).float()
    scheduler.set_begin_index(2)
    prev, same = scheduler.step(torch.full_like(x, torch.nan), t, x, 0.0, 0.0, 1.0, 1.0, None, False, x0)
    s, following = scheduler.sigmas[2:4].double()
    assert same is x0
    torch.testing.assert_close(prev.double(), x + (following - s) / s * (x.double() - x0), rtol=1e-6, atol=1e-6)


TWICE = [name for name in DEFAULTS if getattr(mk.schedulers, name).order == 2]


@pytest.mark.parametrize("class_name", [name for name in TWICE if not name.startswith("Flow")])
def test_two_evaluations_make_a_step(class_name):
    """What pipelines look at, and a straight way: where x0 and the noise are constant every level is reached exactly."""
    scheduler = made(class_name)
    scheduler.set_timesteps(6)
    assert len(scheduler.timesteps) == 11 and scheduler.state_in_first_order
    x0, z = image(3, (1, 2, 3)), image(4, (1, 2, 3))
    x, noisy = x0 + scheduler.sigmas[0].double() * z, class_name in NOISY
    for k, t in enumerate(scheduler.timesteps):
        first = k % 2 == 0
        assert scheduler.state_in_first_order is first
        level = x / scheduler.scale_model_input(x, t)
        before = x
        x, clean = scheduler.step(z, t, x, return_dict=False)
        if not (noisy and k > 1):  # which replaces a part of the noise
            torch.testing.assert_close(clean, x0 + 0 * z, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close((level**2 - 1).sqrt() * z + x0, before, rtol=1e-6, atol=1e-6)
        if not first and not noisy:
            torch.testing.assert_close(x, x0 + scheduler.sigmas[k].double() * z, rtol=1e-12, atol=1e-10)
    assert not noisy or not torch.allclose(x, x0)
    assert scheduler.sample is not None  # the last step has one evaluation
    scheduler.set_timesteps(6)
    assert scheduler.state_in_first_order and scheduler.sample is None


def test_heun_leaves_the_difference_of_levels_as_diffusers_has_it():
    """`dt`, by which diffusers' own second evaluation would go on; also after another run, and after levels written in place."""
    scheduler, x = made("HeunDiscreteScheduler"), image(3, (1, 2, 3)).float()
    for change in (lambda: scheduler.set_timesteps(6), lambda: scheduler.set_timesteps(4), lambda: scheduler.sigmas.mul_(0.5)):
        change()
        for k in (0, 2):
            scheduler._step_index, scheduler.dt = k, None
            scheduler.step(x, scheduler.timesteps[k], x)
            assert same_bits(scheduler.dt, scheduler.sigmas[k + 1] - scheduler.sigmas[k])


@pytest.mark.parametrize("class_name", TWICE)
def test_a_step_is_gone_on_with_by_a_copy(class_name):
    whole = made(class_name)
    g = {"generator": torch.Generator().manual_seed(1)} if class_name in NOISY else {}
    expected = sampled(whole, **g)
    scheduler = made(class_name)
    scheduler.set_timesteps(6)
    x = image(99, (2, 3, 4, 5)).float() * getattr(scheduler, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(1)
    for k, t in enumerate(scheduler.timesteps):
        if k == 5:  # in the middle of a step
            scheduler = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
        options = {"generator": generator} if class_name in NOISY else {}
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.tanh(seen), t, x, **options).prev_sample
        assert same_bits(x, expected[k])
    scheduler.set_timesteps(6)
    scheduler.sample = scheduler.dt = x
    with pytest.raises(Unplanned, match="step 0 must be the first evaluation"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_exact_where_the_derivative_is_a_polynomial(order):
    """Of degree order - 1 in sigma, once there is history enough."""
    scheduler = made("LMSDiscreteScheduler")
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.double().tolist()
    grown = [sum(s ** (j + 1) / (j + 1) for j in range(order)) for s in sigmas]  # the integral of sum_j s^j
    for k, t in enumerate(scheduler.timesteps):
        slope = sum(sigmas[k] ** j for j in range(order))
        x = torch.tensor([[grown[k]]], dtype=torch.float64)
        y = scheduler.step(torch.tensor([[slope]], dtype=torch.float64), t, x, order=order).prev_sample
        if k >= order - 1:
            assert y.item() == pytest.approx(grown[k + 1], rel=1e-12, abs=1e-12 * grown[0])
    assert len(scheduler.derivatives) == order
    weights = [scheduler.get_lms_coefficient(order, 5, j) for j in range(order)]
    assert sum(weights) == pytest.approx(sigmas[6] - sigmas[5], rel=1e-12)
