"""What is particular to single classes of mk.schedulers, beside what test_schedulers.py asks of all."""

import copy
import pickle

import pytest
import torch
from plan_executor import image
from test_schedulers import Watch, made, sampled

from mmgen_kernels.battery.laws import same_bits

SHAPE = (2, 3, 4, 6)


def test_cogvideox_ddim_takes_any_timestep():
    scheduler = made("CogVideoXDDIMScheduler")
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(torch.zeros(1, 2), 555, torch.zeros(1, 2))
    scheduler.set_timesteps(10)
    x = image(3, (1, 2, 3)).float()
    one = scheduler.step(torch.tanh(x), 555, x).prev_sample
    a, b = scheduler.alphas_cumprod[[555, 455]]
    clean = (x - (1 - a).sqrt() * torch.tanh(x)) / a.sqrt()
    torch.testing.assert_close(one.double(), b.sqrt() * clean + (1 - b).sqrt() * torch.tanh(x).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", ("torch", "philox"))
@pytest.mark.parametrize("mode", ("bicubic", "nearest"))
def test_a_flow_is_resized_between_data_and_noise(noise, mode):
    """Each step's data by its factor of the first size, and the last step's as they come."""
    scheduler = type(made("FlowMatchLCMScheduler")).from_config({"scale_factors": [1.0, 2.0, 1.5]}, noise=noise)
    scheduler.set_timesteps(4)
    scheduler.set_scale_factors([1.0, 2.0, 1.5], mode)
    x, sizes = image(1, SHAPE).float(), [(4, 6), (8, 12), (6, 9), (6, 9)]
    for k, (t, size) in enumerate(zip(scheduler.timesteps, sizes, strict=True)):
        output, (s, to) = torch.tanh(x), scheduler.sigmas[k : k + 2].tolist()
        found = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(k)).prev_sample
        data = torch.nn.functional.interpolate(x - s * output, size=size, mode=mode) if k < 3 else x - s * output
        assert found.shape == (2, 3, *size)
        if noise == "torch":
            drawn = torch.randn(data.shape, generator=torch.Generator().manual_seed(k))
            torch.testing.assert_close(found, (1 - to) * data + to * drawn, rtol=1e-5, atol=1e-5)
        elif to > 0.1:
            assert 0.5 < float((found - (1 - to) * data).std()) / to < 1.6
        x = found
    scheduler.set_scale_factors([2.0], "bicubic")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="scale_factors must be one for each of 4 steps but the last, got 1"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_shift_that_is_set_serves_the_next_run():
    scheduler, other = made("FlowMatchLCMScheduler"), made("FlowMatchLCMScheduler", shift=3.0)
    scheduler.set_shift(3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.1])
    other.set_timesteps(sigmas=[1.0, 0.5, 0.1])
    assert scheduler.shift == 3.0 and scheduler.config.shift == 1.0
    assert torch.equal(scheduler.sigmas, other.sigmas) and scheduler.sigma_max == 1.0


@pytest.mark.parametrize("eta", (0.0, 0.5))
def test_tcd_lands_between_two_timesteps(eta):
    scheduler = made("TCDScheduler")
    scheduler.set_timesteps(4)
    (t, following), x = scheduler.timesteps[:2].tolist(), image(2, SHAPE).float()
    output, drawn = torch.tanh(x), torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    found = scheduler.step(output, t, x, eta=eta, generator=torch.Generator().manual_seed(3))
    a, b, c = scheduler.alphas_cumprod[[t, following, int((1 - eta) * following)]].double()
    x64, output64 = x.double(), output.double()
    between = c.sqrt() * (x64 - (1 - a).sqrt() * output64) / a.sqrt() + (1 - c).sqrt() * output64
    expected = (b / c).sqrt() * between + (1 - b / c).sqrt() * drawn
    torch.testing.assert_close(found.pred_noised_sample.double(), between, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.prev_sample.double(), expected, rtol=1e-5, atol=1e-5)
    assert same_bits(found.prev_sample, found.pred_noised_sample) == (eta == 0)
    with pytest.raises(ValueError, match=r"eta must be between 0 and 1, got 1\.5"):
        scheduler.step(output, scheduler.timesteps[1], x, eta=1.5)


def test_cogvideox_dpm_draws_twice_and_is_told_of_the_step_before():
    scheduler = made("CogVideoXDPMScheduler")
    scheduler.set_timesteps(5)
    times, x = scheduler.timesteps.tolist(), image(4, SHAPE).float()
    generator, twin = (torch.Generator().manual_seed(5) for _ in range(2))
    first = scheduler.step(torch.tanh(x), None, times[0], None, x, generator=generator, return_dict=True)
    assert type(first) is tuple and len(first) == 2  # a tuple, as in diffusers
    normals = [torch.randn(SHAPE, generator=twin) for _ in range(3)]
    a, b, c = scheduler.alphas_cumprod[times[:3]]
    y = first[0]
    second = scheduler.step(torch.tanh(y), first[1], times[1], times[0], y, generator=generator, return_dict=True)
    before, here, there = ((v / (1 - v)).log() / 2 for v in (a, b, c))
    h, r = there - here, (here - before) / (there - here)
    y64, d64 = y.double(), first[1].double()
    clean = (y64 - (1 - b).sqrt() * torch.tanh(y).double()) / b.sqrt()
    data = (1 + 1 / (2 * r)) * clean - d64 / (2 * r)
    expected = ((1 - c) / (1 - b)).sqrt() * (-h).exp() * y64 - (-2 * h).expm1() * c.sqrt() * data
    expected = expected + (1 - c).sqrt() * (1 - (-2 * h).exp()).sqrt() * normals[2].double()
    torch.testing.assert_close(second.prev_sample.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.pred_original_sample.double(), clean, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="timestep_back must be that of the step before"):
        scheduler.step(x, first[1], times[3], times[1], x)
    with pytest.raises(ValueError, match="timestep must be one of the run's"):
        scheduler.step(x, None, 1, None, x)


# -- pairs of steps -----------------------------------------------------------------------------------------------------


def test_heun_of_a_flow_in_pairs():
    scheduler = made("FlowMatchHeunDiscreteScheduler", shift=3.0)
    x, z = image(5, SHAPE).float(), image(6, SHAPE).float()
    scheduler.set_timesteps(3)
    assert scheduler.order == 2 and len(scheduler.timesteps) == 5
    noised = scheduler.scale_noise(x, scheduler.timesteps[0], z)
    assert same_bits(noised, z) and scheduler.step_index == 0  # level 1
    s, to = scheduler.sigmas[:2].double()
    first = scheduler.step(torch.tanh(x), scheduler.timesteps[0], x).prev_sample
    assert not scheduler.state_in_first_order and scheduler.sample is x and scheduler.prev_derivative.dtype == torch.float32
    torch.testing.assert_close(first.double(), x + (to - s) * torch.tanh(x).double(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="second step must be churned as its first"):
        scheduler.step(torch.tanh(first), scheduler.timesteps[1], first, s_churn=3.0)
    second = scheduler.step(torch.tanh(first), scheduler.timesteps[1], first).prev_sample
    slope = (torch.tanh(x).double() + torch.tanh(first).double()) / 2
    torch.testing.assert_close(second.double(), x + (to - s) * slope, rtol=1e-6, atol=1e-6)
    assert scheduler.state_in_first_order and scheduler.sample is None and scheduler.step_index == 2


def test_a_churned_pair_draws_twice():
    """And what the second draws does not arrive, as in diffusers."""
    scheduler = made("FlowMatchHeunDiscreteScheduler")
    scheduler.set_timesteps(3)
    generator, twin, x = torch.Generator().manual_seed(8), torch.Generator().manual_seed(8), image(7, SHAPE).float()
    drawn, _ = (torch.randn(SHAPE, generator=twin) for _ in range(2))
    s, hat = scheduler.sigmas[0].double(), scheduler.sigmas[0].double() * 1.4
    first = scheduler.step(torch.tanh(x), scheduler.timesteps[0], x, s_churn=2.0, generator=generator)
    torch.testing.assert_close(scheduler.sample.double(), x.double() + (hat**2 - s**2).sqrt() * drawn, rtol=1e-6, atol=1e-6)
    scheduler.step(torch.tanh(x), scheduler.timesteps[1], first.prev_sample, s_churn=2.0, generator=generator)
    assert torch.equal(generator.get_state(), twin.get_state())


# -- DPM-Solver in groups of steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "steps", "orders", "changed"),
    [
        ({"solver_order": 3, "final_sigmas_type": "sigma_min"}, 6, [1, 2, 3, 1, 2, 3], False),
        ({"solver_order": 3, "final_sigmas_type": "sigma_min"}, 7, [1, 2, 3, 1, 2, 3, 1], True),
        ({"solver_order": 3, "final_sigmas_type": "sigma_min"}, 8, [1, 2, 3, 1, 2, 3, 1, 2], True),
        ({"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": True}, 6, [1, 2, 3, 1, 2, 1], True),
        ({"solver_order": 3}, 8, [1, 2, 3, 1, 2, 3, 1, 1], True),
        ({}, 4, [1, 2, 1, 1], True),
        ({}, 5, [1, 2, 1, 2, 1], True),
        ({"solver_order": 1}, 3, [1, 1, 1], True),
    ],
)
def test_groups_of_steps(config, steps, orders, changed):
    scheduler = made("DPMSolverSinglestepScheduler", **config)
    scheduler.set_timesteps(steps)
    assert scheduler.order_list == orders and scheduler.config.lower_order_final == changed
    assert all(m.isfinite().all() for m in sampled(scheduler, steps=steps))


def test_entering_a_group_in_its_middle():
    """What a group began with is an attribute: a copy goes on; a run that begins there begins a group of its own."""
    config = {"solver_order": 3, "final_sigmas_type": "sigma_min"}
    expected = sampled(made("DPMSolverSinglestepScheduler", **config))
    scheduler, x = made("DPMSolverSinglestepScheduler", **config), image(99, (2, 3, 4, 5)).float()
    scheduler.set_timesteps(6)
    for k, t in enumerate(scheduler.timesteps):
        if k in (2, 4):
            scheduler = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
        assert same_bits(x, expected[k])
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    x = image(98, SHAPE).float()
    assert scheduler.step(torch.tanh(x), scheduler.timesteps[2], x).prev_sample.isfinite().all()
    assert scheduler.sample is x and scheduler.step_index == 3
    scheduler.sample = None
    scheduler._step_index = 4
    with pytest.raises(ValueError, match="history must hold x1"):
        scheduler.step(x, scheduler.timesteps[4], x)


# -- SA-Solver ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ("torch", "philox"))
@pytest.mark.parametrize(("orders", "launches"), [((2, 2), 1), ((3, 3), 2), ((4, 4), 3)])
def test_a_stochastic_run_goes_on_in_a_copy(noise, orders, launches):
    """Predictor, corrector and the noise between them; inputs that the operator does not take at once are more passes."""
    config = {"predictor_order": orders[0], "corrector_order": orders[1], "tau_func": half}
    scheduler = type(made("SASolverScheduler")).from_config(config, noise=noise)
    expected = sampled(scheduler, steps=9, generator=torch.Generator().manual_seed(2))
    scheduler.set_timesteps(9)
    generator, x = torch.Generator().manual_seed(2), image(99, (2, 3, 4, 5)).float()
    for k, t in enumerate(scheduler.timesteps):
        if k == 5 and noise == "torch":  # a copy draws a key of its own
            scheduler = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
        if k == 6:
            with Watch(x.numel()) as watch:
                scheduler.step(x, t, x, generator=torch.Generator().manual_seed(3))
            assert watch.launches == launches + 1  # the noise, of either kind
            break
        x = scheduler.step(torch.tanh(x), t, x, generator=generator).prev_sample
        assert same_bits(x, expected[k])
    assert scheduler.this_predictor_order, scheduler.this_corrector_order == orders


def half(timestep):
    return 0.5


def test_taus_are_those_of_the_schedules_timesteps():
    """A function in the attribute's place is heard; a timestep that is not the step's is refused where its tau is another one."""
    scheduler, still = made("SASolverScheduler"), made("SASolverScheduler")
    still.tau_func = lambda timestep: 0
    x = image(1, SHAPE).float()
    found = []
    for each in (scheduler, still):
        each.set_timesteps(6)
        each.set_begin_index(2)
        found.append(each.step(torch.tanh(x), each.timesteps[2], x, generator=torch.Generator().manual_seed(3)).prev_sample)
    assert not torch.allclose(found[0], found[1])
    assert scheduler.step(x, 444, x).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="timestep must have the tau of step 4, whose is 333, got 5"):
        scheduler.step(x, 5, x)
