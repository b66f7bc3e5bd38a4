"""PNDM's evaluations: by `step` and by its halves, from any state that its attributes may be in."""

import copy
import pickle

import pytest
import torch
from plan_executor import image
from test_schedulers import made, sampled

import mmgen_kernels as mk
from mmgen_kernels.battery.laws import same_bits

SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("config", [{}, {"skip_prk_steps": True}], ids=str)
@pytest.mark.parametrize("of", ["views", "numbers", "halves"])
def test_a_run_by_its_evaluations(config, of):
    """Timesteps come twice; as numbers the counter tells which of the two it is. A copy goes on as the original would have."""
    whole = made("PNDMScheduler", **config)
    expected = sampled(whole, steps=7)
    assert len(expected) == len(whole.prk_timesteps) + len(whole.plms_timesteps) == (8 if config else 16)
    scheduler = made("PNDMScheduler", **config)
    scheduler.set_timesteps(7)
    x = image(99, SHAPE).float()
    for k, t in enumerate(scheduler.timesteps):
        if k == 6:  # in the middle of a step of Runge and Kutta
            scheduler = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
            t = scheduler.timesteps[k]
        step = scheduler.step
        if of == "halves":
            step = scheduler.step_prk if k < len(scheduler.prk_timesteps) else scheduler.step_plms
        x = step(torch.tanh(x), t if of == "views" else int(t), x).prev_sample
        assert same_bits(x, expected[k])
    assert len(scheduler.stepper.tables) == 1  # of the whole run
    assert scheduler.counter == len(expected) and len(scheduler.ets) == 4


def test_plms_needs_a_past():
    scheduler = made("PNDMScheduler")
    x = image(1, SHAPE)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 3, x)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="ets must have 3 outputs of prk before plms"):
        scheduler.step_plms(x, 901, x)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kept", range(6))
@pytest.mark.parametrize("counter", range(6))
def test_states_that_no_run_comes_to(skip, kept, counter):
    """The attributes are there to be set: what diffusers makes of them, ours makes of them, or what it refuses is refused."""
    diffusers = pytest.importorskip("diffusers")
    past = [image(20 + j, SHAPE) for j in range(kept)]
    x, m = image(1, SHAPE), image(2, SHAPE)
    for method in ("step_plms", "step_prk")[: 2 - skip]:
        found = []
        for package in (diffusers, mk.schedulers):
            scheduler = package.PNDMScheduler(skip_prk_steps=skip)
            scheduler.set_timesteps(10)
            scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
            scheduler.ets, scheduler.counter, scheduler.cur_sample = past[:], counter, image(3, SHAPE)
            scheduler.cur_model_output = image(4, SHAPE) if counter % 4 else 0
            try:
                found.append(getattr(scheduler, method)(m, 307, x).prev_sample)
            except (ValueError, LookupError):
                found.append(None)
                continue
            assert scheduler.counter == counter + 1
            found.append(scheduler.ets)
        if None in found:
            assert found == [None, None]
        else:
            torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)
            assert len(found[1]) == len(found[3]) and all(a is b for a, b in zip(found[1], found[3], strict=True))


def test_a_patched_instance_steps_by_its_halves():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.PNDMScheduler()
    expected = [v.clone() for v in halves(scheduler)]
    with mk.patch(scheduler, strict=True):
        found = halves(scheduler)
        assert scheduler.step_prk.fused == 12 and scheduler.step_plms.fused == 4 and scheduler.step.calls == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "step_prk" not in vars(scheduler)


def halves(scheduler):
    scheduler.set_timesteps(7)
    x, found = image(99, SHAPE).float(), []
    for name in ("prk", "plms"):
        for t in getattr(scheduler, f"{name}_timesteps"):
            x = getattr(scheduler, f"step_{name}")(torch.tanh(x), int(t), x).prev_sample
            found.append(x)
    return found
