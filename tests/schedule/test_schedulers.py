"""mk.schedulers without diffusers: recorded runs of diffusers, configs, noise, noising, syncs, and what they refuse."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from called import READS, Called
from plan_executor import image, model
from recorded_cases import SHAPE
from test_planner import RECORDS, levels_of, name
from torch.utils._python_dispatch import TorchDispatchMode

import mmgen_kernels as mk
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.schedule.planner import DEFAULTS
from mmgen_kernels.schedule.schedulers.stepper import Stepper, Unplanned

FP32, BF16 = torch.float32, torch.bfloat16
OF_STEP = ("eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")


NOISY = (
    "DDPMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "CogVideoXDPMScheduler",
    "SASolverScheduler",
    "FlowMatchLCMScheduler",
    "CMStochasticIterativeScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)  # whose bf16 normals are other normals


def made(class_name, **config):
    return getattr(mk.schedulers, class_name)(**config)


def set_run(scheduler, run):
    taken = inspect.signature(scheduler.set_timesteps).parameters
    if "shift" in run:
        scheduler.set_shift(run["shift"])
    scheduler.set_timesteps(**{n: v for n, v in run.items() if n in taken})


def past(scheduler, t=None, results=(None, None)):
    """What a step is handed of the one before, where its class keeps nothing itself."""
    handed = "timestep_back" in inspect.signature(scheduler.step).parameters
    return {"timestep_back": t, "old_pred_original_sample": results[1]} if handed else {}


def sampled(scheduler, steps=6, dtype=FP32, generator=None, shape=(2, 3, 4, 5), **options):
    """Samples of a run whose model is a bounded function."""
    mu = {"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **mu)
    x = image(99, shape).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    if generator is not None:
        options["generator"] = generator
    found, before = [], past(scheduler)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        results = scheduler.step(torch.tanh(seen), timestep=t, sample=x, **before, **options, return_dict=False)
        x, before = results[0], past(scheduler, t, results)
        found.append(x)
    return found


# -- what the steps compute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_recorded_trajectory(record, monkeypatch):
    """Runs of diffusers in fp64, by class, set_timesteps, scale_model_input and step."""
    run, schedule = record["run"], levels_of(record)
    scheduler = made(record["class"], **record["config"])
    set_run(scheduler, run)
    assert scheduler.timesteps.tolist() == pytest.approx(record["timesteps"], rel=1e-6, abs=1e-3)
    assert getattr(scheduler, "init_noise_sigma", 1.0) == pytest.approx(record["init_noise_sigma"], rel=5e-7)
    if schedule.sigmas is not None:  # another machine's fp32 may differ in the last place
        scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float64)
    if schedule.alphas_cumprod is not None:
        scheduler.alphas_cumprod = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    learned = record["config"].get("variance_type") == "learned_range"
    begin, x = run.get("begin", 0), image(99, SHAPE) * schedule.init_noise_sigma
    scheduler.set_begin_index(begin)
    options = {n: run[n] for n in OF_STEP if n in run and n in inspect.signature(scheduler.step).parameters}
    before = past(scheduler)
    for k, (t, recorded) in enumerate(zip(scheduler.timesteps[begin:], record["steps"], strict=True)):
        monkeypatch.setattr(Stepper, "draw", lambda *a, k=k: image(k, SHAPE, speed=2.1))
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(k, seen, SHAPE[1] * (1 + learned))
        outputs = scheduler.step(output, timestep=t, sample=x, **before, **options, return_dict=True)
        outputs = outputs if isinstance(outputs, tuple) else outputs.to_tuple()
        for ours, theirs in zip(outputs, recorded, strict=False):
            expected = torch.tensor([float(v) for v in theirs], dtype=torch.float64).view(SHAPE)
            assert (ours - expected).abs().max() <= 1e-8 * expected.abs().max()
        x, before = outputs[0], past(scheduler, t, outputs)


@pytest.mark.parametrize("class_name", [name for name in DEFAULTS if name not in NOISY])
def test_16_bits_are_nearer_to_fp64_than_per_operation_rounding_would_be(class_name):
    """The state of a run in bf16 is rounded once a step: half an ulp of its largest value per step, and no more."""
    exact = sampled(made(class_name), dtype=torch.float64)
    for k, (a, b) in enumerate(zip(sampled(made(class_name), dtype=BF16), exact, strict=True), 1):
        assert (a.double() - b).square().mean().sqrt() <= 2.0**-8 * k * max(e.abs().max() for e in exact[:k])


@pytest.mark.parametrize("class_name", ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"))
def test_a_step_has_a_derivative_and_maps(class_name):
    """Arguments that a step of two tensors leaves out are there where autograd and vmap ask for them."""
    scheduler = made(class_name)
    scheduler.set_timesteps(6)

    def step(x, m):
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        scheduler.forget()
        return scheduler.step(m, scheduler.timesteps[0], x, return_dict=False)[0]

    x, m = (image(seed, (3, 4, 5)).float().requires_grad_() for seed in (1, 2))
    slopes = torch.autograd.grad(step(x, m).sum(), (x, m))
    with torch.no_grad():
        one = torch.ones_like(x)
        expected = [step(one, 0 * one), step(0 * one, one)]
        mapped = torch.func.vmap(step)(x, m)
        assert same_bits(mapped, step(x, m))
    for slope, coefficient in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, coefficient, rtol=1e-6, atol=1e-6)


def test_a_plan_is_what_steps_go_by():
    plan = mk.schedulers.plan("DDIMScheduler", {"clip_sample": False}, num_inference_steps=5, eta=0.0)
    scheduler = made("DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(5)
    assert list(plan.timesteps) == scheduler.timesteps.tolist() and plan.inputs == ("sample", "model_output")
    x, m = (image(seed, (2, 3)).float() for seed in (1, 2))
    found = mk.scheduler_step((x, m), torch.tensor(plan.rows, dtype=torch.float64), 2)
    assert all(map(same_bits, found, scheduler.step(m, scheduler.timesteps[2], x, return_dict=False)))
    with pytest.raises(TypeError, match="number_of_steps"):
        mk.schedulers.plan("DDIMScheduler", {}, number_of_steps=5)
    with pytest.raises(ValueError, match="NoScheduler"):
        mk.schedulers.plan("NoScheduler", {}, num_inference_steps=5)


@pytest.mark.parametrize("class_name", ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"))
def test_entering_a_run_in_its_middle(class_name):
    """History and step index are attributes: a copy of the scheduler goes on as the original would have."""
    whole = made(class_name)
    expected = sampled(whole)
    scheduler = made(class_name)
    scheduler.set_timesteps(6)
    x = image(99, (2, 3, 4, 5)).float()
    for k, t in enumerate(scheduler.timesteps):
        if k == 3:
            scheduler = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
        assert same_bits(x, expected[k])
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(4)
    x = image(98, (2, 3, 4, 5)).float()
    first = scheduler.step(torch.tanh(x), scheduler.timesteps[4], x).prev_sample
    assert first.isfinite().all() and scheduler.step_index == 5 and scheduler.lower_order_nums == 1


def test_a_timestep_that_a_run_leaves_out_is_not_its_neighbour():
    """It lies in the memory of the run's timesteps, between two of them."""
    x, m = image(1, SHAPE).float(), image(2, SHAPE).float()
    ddim, ddpm = made("DDIMScheduler"), made("DDPMScheduler")
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(10)
        every = scheduler.timesteps
        scheduler.timesteps = every[::2]
    found = ddim.step(m, every[1], x).prev_sample
    assert same_bits(found, ddim.step(m, int(every[1]), x).prev_sample)
    with pytest.raises(ValueError, match="timestep must be one of the run's, got 800"):
        ddpm.step(m, every[1], x)


def test_ddim_takes_any_timestep():
    """Inversion and editing call step with timesteps of their own."""
    scheduler = made("DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(10)
    x = image(3, (1, 2, 3)).float()
    one = scheduler.step(torch.tanh(x), 555, x).prev_sample
    a, b = scheduler.alphas_cumprod[[555, 455]].double()
    clean = (x - (1 - a).sqrt() * torch.tanh(x)) / a.sqrt()
    expected = b.sqrt() * clean.double() + (1 - b).sqrt() * torch.tanh(x).double()
    torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=1e-6)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_generator():
    scheduler = made("EulerAncestralDiscreteScheduler")
    drawn = []
    for generator in (7, [7, 8]):
        many = isinstance(generator, list)
        g = [torch.Generator().manual_seed(s) for s in generator] if many else torch.Generator().manual_seed(generator)
        scheduler.set_timesteps(4)
        t, x, m = scheduler.timesteps[0], image(1, (2, 3, 4)).float(), torch.zeros(2, 3, 4)
        scheduler.scale_model_input(x, t)
        out = scheduler.step(m, t, x, generator=g).prev_sample
        s, s_next = scheduler.sigmas[:2].double()
        up = (s_next**2 * (s**2 - s_next**2) / s**2).sqrt()
        drawn.append((out.double() - x) / up)  # the model says that there is no noise to take away
    whole = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(7))
    each = torch.cat([torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (7, 8)])
    for found, expected in zip(drawn, (whole, each), strict=True):
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)


def test_philox_repeats_and_differs_from_step_to_step_and_run_to_run():
    scheduler = mk.schedulers.DDPMScheduler.from_config({"clip_sample": False}, noise="philox")
    runs = [sampled(scheduler, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert same_bits(runs[0][-1], runs[1][-1]) and not torch.equal(runs[0][0], runs[2][0])
    each = [torch.Generator().manual_seed(s) for s in (3, 5)]
    alone = sampled(scheduler, generator=[torch.Generator().manual_seed(5)], shape=(1, 3, 4, 5))
    assert torch.isfinite(sampled(scheduler, generator=each)[-1]).all() and torch.isfinite(alone[-1]).all()
    assert torch.isfinite(sampled(scheduler, generator=each[:1])[-1]).all()  # a list of one serves a batch, as for torch's noise


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("CogVideoXDPMScheduler", {}),
    ],
)
def test_philox_has_new_noise_for_each_step_and_the_same_whatever_ran_before(class_name, config, monkeypatch):
    """Also where a run begins in its middle, or goes on without history: rows of plans are counted from their beginnings."""
    scheduler = getattr(mk.schedulers, class_name).from_config(config, noise="philox")
    run, used = Stepper.run, []

    def recorded(stepper, table, k, named, dtypes, noise=None, variance=None):
        if noise is not None:
            used.append(tuple(mk.fold_in(noise, k).tolist()))
        return run(stepper, table, k, named, dtypes, noise, variance)

    monkeypatch.setattr(Stepper, "run", recorded)

    def keys_of(begin):
        used.clear()
        scheduler.set_timesteps(16)
        scheduler.set_begin_index(begin)
        x, generator = image(1, (1, 2, 3)).float(), torch.Generator().manual_seed(5)
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(torch.tanh(x), timestep=t, sample=x, generator=generator, **past(scheduler))[0]
        return list(used)

    whole = keys_of(0)
    late = keys_of(5 + scheduler.order % 2)
    assert len(set(whole)) == len(whole) > 3 and len(set(late)) == len(late) > 3
    assert keys_of(0) == whole


# -- noising ----------------------------------------------------------------------------------------------------------


def test_add_noise_and_velocity():
    x, z = image(1, (3, 2, 4)).float(), image(2, (3, 2, 4)).float()
    shaped = (3, 1, 1)
    ddpm = made("DDPMScheduler")
    t = torch.tensor([0, 500, 999])
    a = ddpm.alphas_cumprod[t].double().view(shaped)
    torch.testing.assert_close(ddpm.add_noise(x, z, t).double(), a.sqrt() * x + (1 - a).sqrt() * z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ddpm.get_velocity(x, z, t).double(), a.sqrt() * z - (1 - a).sqrt() * x, rtol=1e-6, atol=1e-6)
    for class_name, shares in (
        ("EulerDiscreteScheduler", lambda s: (1 + 0 * s, s)),
        ("FlowMatchEulerDiscreteScheduler", lambda s: (1 - s, s)),
        ("DPMSolverMultistepScheduler", lambda s: (1 / (s * s + 1).sqrt(), s / (s * s + 1).sqrt())),
    ):
        scheduler = made(class_name)
        scheduler.set_timesteps(20)
        places = torch.tensor([2, 19, 7])
        s = scheduler.sigmas[places].double().view(shaped)
        noised = getattr(scheduler, "scale_noise", None) or scheduler.add_noise
        given = (x, scheduler.timesteps[places], z) if hasattr(scheduler, "scale_noise") else (x, z, scheduler.timesteps[places])
        signal, noise = shares(s)
        torch.testing.assert_close(noised(*given).double(), signal * x + noise * z, rtol=1e-6, atol=1e-6)
        elsewhere = torch.full((3,), 0.123) if scheduler.timesteps.is_floating_point() else torch.full((3,), 1)
        strange = (x, elsewhere, z) if hasattr(scheduler, "scale_noise") else (x, z, elsewhere)
        assert noised(*strange).isnan().all()  # never silently another level


@pytest.mark.parametrize("class_name", ["DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_noising_copies_its_tables_to_a_device_once(class_name):
    """A copy from the host waits for what the device is doing. What was changed meanwhile is copied anew."""
    scheduler = made(class_name)
    scheduler.set_timesteps(20, device="meta")
    x, t = torch.empty(3, 2, 4, device="meta"), scheduler.timesteps[[2, 19, 7]]
    copies = []
    for _ in range(3):
        with Called() as called:
            scheduler.add_noise(x, x, t)
        copies.append(sum(name == "_to_copy" for name in called.names))
    table = scheduler.alphas_cumprod if class_name == "DDPMScheduler" else scheduler.sigmas
    t = scheduler.timesteps = torch.arange(3) if class_name == "DDPMScheduler" else torch.tensor([3.0, 2.0, 1.0])
    x, z = image(1, (3, 2, 4)).float(), image(2, (3, 2, 4)).float()
    before = scheduler.add_noise(x, z, t)
    assert same_bits(before, scheduler.add_noise(x, z, t))
    table.mul_(0.5)
    assert copies[0] > copies[1] == copies[2] and not torch.equal(before, scheduler.add_noise(x, z, t))


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_a_run_on_a_device_reads_nothing_back(class_name):
    """From the first step on, without a begin index: a read of a meta tensor raises."""
    scheduler = made(class_name)
    mu = {"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(6, device="meta", **mu)
    x, before = torch.empty(2, 3, 4, 5, device="meta"), past(scheduler)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        results = scheduler.step(seen, timestep=t, sample=x, **before, return_dict=False)
        x, before = results[0], past(scheduler, t, results)
    assert x.shape == (2, 3, 4, 5)


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_a_config_goes_to_a_file_and_back(class_name, tmp_path):
    scheduler = made(class_name, num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path / "scheduler")
    content = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert content == {"_class_name": class_name, **scheduler.config}
    again = type(scheduler).from_pretrained(tmp_path, subfolder="scheduler", num_train_timesteps=400)
    assert dict(again.config) == {**scheduler.config, "num_train_timesteps": 400} and len(again) == 400
    assert list(inspect.signature(type(scheduler)).parameters) == list(DEFAULTS[class_name])
    assert again.config.num_train_timesteps == 400
    with pytest.raises(TypeError, match="config does not change"):
        again.config["num_train_timesteps"] = 3


def test_another_schedulers_config_is_kept_for_the_way_back():
    ddim = made("DDIMScheduler", clip_sample=False, beta_schedule="scaled_linear")
    dpm = mk.schedulers.DPMSolverMultistepScheduler.from_config(ddim.config)
    assert dpm.config.beta_schedule == "scaled_linear" and dpm.config.clip_sample is False
    assert mk.schedulers.DDIMScheduler.from_config(dpm.config).config == {**dpm.config}


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_the_levels_of_training_are_those_of_the_config(class_name):
    option = next(name for name in ("beta_end", "shift", "sigma_max") if name in DEFAULTS[class_name])
    changed = {"num_train_timesteps": 500, option: {"beta_end": 0.012, "shift": 3.0, "sigma_max": 20.0}[option]}
    ours, expected = type(made(class_name)).from_config(changed), made(class_name, **changed)
    for levels in ("alphas_cumprod", "sigmas", "timesteps"):
        a, b = getattr(ours, levels), getattr(expected, levels)
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_subclass_may_take_more_and_hand_on_the_rest():
    class Named(mk.schedulers.DDIMScheduler):
        def __init__(self, label="none", **arguments):
            super().__init__(**arguments)
            self.label = label

    scheduler = Named.from_config({"label": "mine", "beta_end": 0.012, "of_another_class": 1})
    assert scheduler.label == "mine" and scheduler.config.of_another_class == 1
    assert torch.equal(scheduler.alphas_cumprod, made("DDIMScheduler", beta_end=0.012).alphas_cumprod)


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_inference_mode(class_name):
    """Its tensors, the timesteps among them, do not count what is written into them."""

    def run(scheduler):
        return sampled(scheduler, generator=torch.Generator().manual_seed(3) if class_name in NOISY else None)

    expected = run(made(class_name))
    with torch.inference_mode():
        scheduler = made(class_name)
        found = run(scheduler)
        again = sampled(scheduler, steps=5)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True)) and len(again) == len(scheduler.timesteps)


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_what_inference_mode_made_has_derivatives_afterwards(class_name):
    """Validation in inference mode, as trainers have it, must not leave plans or levels that autograd cannot keep."""
    scheduler = made(class_name)

    def slope():
        x = image(7, SHAPE).float().requires_grad_()
        scheduler.set_timesteps(6)
        call = {"model_output": 0.3 * x, "timestep": scheduler.timesteps[0], "sample": x, **past(scheduler)}
        if class_name in NOISY:
            call["generator"] = torch.Generator().manual_seed(3)
        (found,) = torch.autograd.grad(scheduler.step(**call, return_dict=False)[0].sum(), x)
        return found

    expected = slope()
    with torch.inference_mode():
        scheduler = made(class_name)
        sampled(scheduler)
    assert same_bits(slope(), expected)
    if "add_noise" in dir(scheduler):
        x = image(7, SHAPE).float().requires_grad_()
        scheduler.add_noise(x, image(8, SHAPE).float(), scheduler.timesteps[:1]).sum().backward()


def test_a_run_like_the_last_one_is_not_planned_again():
    scheduler = made("UniPCMultistepScheduler")
    first = sampled(scheduler, steps=6)
    (table,) = scheduler.stepper.tables.values()
    again = sampled(scheduler, steps=6)
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert list(scheduler.stepper.tables.values()) == [table]
    sampled(scheduler, steps=7)
    assert table not in scheduler.stepper.tables.values()
    scheduler.set_timesteps(7)
    (kept,) = scheduler.stepper.tables.values()
    scheduler.sigmas[2] *= 1.25  # somebody's own levels
    scheduler.set_begin_index(0)
    scheduler.step(torch.zeros(2, 3), scheduler.timesteps[0], torch.ones(2, 3))
    assert kept not in scheduler.stepper.tables.values()


# -- no waiting for a device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "dtype", "arrange", "config"),
    [
        ("add", FP32, None, {}),
        ("scheduler_step", torch.float64, None, {}),
        ("scheduler_step", BF16, None, {}),  # where torch.add rounds the product too
        ("scheduler_step", torch.float16, None, {}),
        ("scheduler_step", FP32, lambda t: t.mT.contiguous().mT, {}),
        ("scheduler_step", FP32, lambda t: t.repeat(1, 1, 2**17), {}),
        ("scheduler_step", FP32, None, {"stochastic_sampling": True}),
    ],
)
def test_a_flow_of_few_numbers_is_added_by_torch(expected, dtype, arrange, config):
    """By what is quicker to call; who names an implementation gets that."""
    arrange = arrange or (lambda t: t)
    x, m = (arrange(image(seed, (3, 4, 5)).to(dtype)) for seed in (1, 2))

    def stepped():
        scheduler = made("FlowMatchEulerDiscreteScheduler", **config)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(3) if config else None
        with Called() as called:
            out = scheduler.step(m, scheduler.timesteps[0], x, generator=generator, return_dict=False)[0]
        return out, called.names[-1]

    out, by = stepped()
    assert by == expected
    with mk.use_backend("cpp" if OPERATORS["scheduler_step"].has_cpp else "reference"):
        told, by = stepped()
    assert by == "scheduler_step"
    torch.testing.assert_close(out, told, rtol=3e-7, atol=3e-7)


class Watch(TorchDispatchMode):
    """What reads a value on the host, and what launches, of tensors as large as the sample."""

    def __init__(self, numel):
        super().__init__()
        self.reads, self.launches, self.numel = [], 0, numel

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        called = func.overloadpacket.__name__
        if called in READS:
            self.reads.append(called)
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        self.launches += any(isinstance(o, torch.Tensor) and o.numel() >= self.numel for o in outs)
        return out


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_a_step_reads_nothing_back_and_is_one_launch(class_name):
    scheduler = made(class_name)
    scheduler.set_timesteps(6)
    noisy = class_name in NOISY
    x = torch.randn(2, 3, 8192)  # larger than any table
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    before = past(scheduler)
    for k, t in enumerate(scheduler.timesteps):
        scheduler.is_scale_input_called = True
        with Watch(x.numel()) as watch:
            results = scheduler.step(x * 0.5, timestep=t, sample=x, **before, return_dict=False)
        scaled = 1  # x * 0.5, the model
        thrown_away = before.get("timestep_back") is not None  # normals that diffusers draws
        assert watch.reads == []
        assert watch.launches - scaled <= 1 + noisy + thrown_away, k  # and the normals, where they are torch's
        x, before = results[0], past(scheduler, t, results)


# -- what is refused --------------------------------------------------------------------------------------------------

X = torch.zeros(1, 2, 3)
REFUSED = [
    (lambda: made("DDIMScheduler", beta_shedule="linear"), TypeError, "beta_shedule"),
    (lambda: mk.schedulers.DDIMScheduler.from_config("folder"), TypeError, "config must be a dict of arguments, got str"),
    (lambda: mk.schedulers.DDIMScheduler.from_config({}, noise="cuda"), ValueError, "noise must be one of torch, philox, got"),
    (lambda: mk.schedulers.DDIMScheduler.from_pretrained("/nowhere"), FileNotFoundError, "folder must hold scheduler_config.json"),
    (lambda: made("DDPMScheduler").set_timesteps(), ValueError, "one of num_inference_steps and timesteps must be given"),
    (lambda: made("DDPMScheduler").step(X, 1000, X), ValueError, "timestep must be one of the run's, got 1000"),
    (lambda: made("DDPMScheduler").step(X[:, :1], 3, X), ValueError, "model_output must have sample's shape"),
    (lambda: made("DDPMScheduler").step(X.long(), 3, X), ValueError, "model_output must be a float64, float32"),
    (lambda: made("DPMSolverMultistepScheduler").step(X, 3, X), ValueError, "call set_timesteps before step"),
    (lambda: made("EulerDiscreteScheduler").step(X, 3, X), ValueError, "timestep must be one of scheduler.timesteps, not an"),
    (lambda: made("EulerDiscreteScheduler").step(X, 0.5, X), ValueError, "timestep must be one of scheduler.timesteps, got 0.5"),
    (lambda: made("FlowMatchEulerDiscreteScheduler").step(X, 1000.0, X, per_token_timesteps=X), Unplanned, "per_token_timesteps"),
    (lambda: made("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True).set_timesteps(3), ValueError, "mu must be given"),
    (lambda: sampled(made("DDPMScheduler"), generator=[torch.Generator()] * 3), ValueError, "generator must be one, or"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m[:50] for _, _, m in REFUSED])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_flows_have_no_initial_noise_and_scale_nothing():
    """Pipelines ask with hasattr."""
    scheduler = made("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(3)
    assert not hasattr(scheduler, "init_noise_sigma") and not hasattr(scheduler, "scale_model_input")
