"""mk.patch on diffusers' schedulers: the same runs, back to stock, everything else untouched."""

import copy
import inspect
import json
import sys
import types

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.patching import diffusers_schedulers
from mmgen_kernels.schedule.planner import DEFAULTS

SHAPE = (2, 3, 8, 8)


def sampled(scheduler, dtype=torch.float32, steps=9, seed=0):
    """Every sample of a run, and what the last step returned."""
    mu = {"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **mu)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(SHAPE, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)).to(dtype)
    drawn = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    learned = scheduler.config.get("variance_type") == "learned_range"
    found, handed = [], "timestep_back" in inspect.signature(scheduler.step).parameters
    if handed:
        drawn |= {"timestep_back": None, "old_pred_original_sample": None}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        told = torch.tanh(torch.cat((seen, -seen), 1) if learned else seen)
        output = scheduler.step(told, timestep=t, sample=x, **drawn, return_dict=True)
        if handed:
            drawn |= {"timestep_back": t, "old_pred_original_sample": output[1]}
        x = output[0]
        found.append(x)
    return found, output


def dtypes_of(output):
    return [v.dtype for v in (output if isinstance(output, tuple) else output.values())]


def assert_near(ours, stock, dtype):
    tolerance = {torch.float32: 5e-5, torch.float64: 5e-5, torch.bfloat16: 6e-2}[dtype]  # stock's coefficients are fp32
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def off(run, exact):
    return sum((a - b).square().mean() for a, b in zip(run, exact, strict=True))


# -- a twin, so that the rule is tested where diffusers is not ----------------------------------------------------------


@pytest.fixture
def twin(monkeypatch):
    """DDIM as diffusers has it, in a module of that name: the class with what the rule and its users look at."""
    package, module = types.ModuleType("diffusers"), types.ModuleType("diffusers.scheduling_ddim")

    class DDIMSchedulerOutput(dict):
        __getattr__ = dict.__getitem__

        def __getitem__(self, key):
            return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    class DDIMScheduler:
        order, init_noise_sigma = 1, 1.0

        def __init__(self, **config):
            self.config = DEFAULTS["DDIMScheduler"] | config
            betas = torch.linspace(self.config["beta_start"], self.config["beta_end"], self.config["num_train_timesteps"])
            self.alphas_cumprod, self.num_inference_steps = (1 - betas).cumprod(0), None
            self.timesteps = torch.arange(self.config["num_train_timesteps"]).flip(0)

        def set_timesteps(self, num_inference_steps, device=None):
            self.num_inference_steps = num_inference_steps
            self.timesteps = torch.arange(num_inference_steps).flip(0) * (len(self.alphas_cumprod) // num_inference_steps)

        def scale_model_input(self, sample, timestep=None):
            return sample

        def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None,
                 variance_noise=None, return_dict=True):  # fmt: skip
            before = timestep - len(self.alphas_cumprod) // self.num_inference_steps
            a = self.alphas_cumprod[timestep]
            b = self.alphas_cumprod[before] if before >= 0 else torch.tensor(1.0)
            clean = ((sample - (1 - a) ** 0.5 * model_output) / a**0.5).clamp(-1, 1)
            previous = b**0.5 * clean + (1 - b) ** 0.5 * model_output
            return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=clean) if return_dict else (previous, clean)

        def add_noise(self, original_samples, noise, timesteps):
            a = self.alphas_cumprod[timesteps].view(-1, *[1] * (noise.dim() - 1))
            return a**0.5 * original_samples + (1 - a) ** 0.5 * noise

    for made in (DDIMScheduler, DDIMSchedulerOutput):
        made.__module__, made.__qualname__ = module.__name__, made.__name__
        setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, "diffusers", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(diffusers_schedulers, "_verified", set())
    return DDIMScheduler


def test_patched_and_back(twin):
    scheduler = twin()
    signature, expected = inspect.signature(scheduler.step), sampled(scheduler)
    with mk.patch(scheduler, strict=True) as handle:
        assert [r.kind for r in handle.replaced] == ["DDIMScheduler"] and "mk.scheduler_step" in handle.report()
        assert inspect.signature(scheduler.step) == signature and type(scheduler) is twin
        found = sampled(scheduler)
        assert scheduler.step.fused == scheduler.step.calls == 9
        assert_near(found[0], expected[0], torch.float32)
        assert type(found[1]) is type(expected[1])
        x, z, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 500, 999])
        torch.testing.assert_close(scheduler.add_noise(x, z, t), twin.add_noise(scheduler, x, z, t), rtol=1e-5, atol=1e-5)
        named = {"original_samples": x, "noise": z, "timesteps": t}
        assert same_bits(scheduler.add_noise(**named), scheduler.add_noise(x, z, timesteps=t))
        for given in ((x, z.bfloat16(), t), (x, z, torch.tensor([-1, 0, 5]))):  # of another dtype, or the last level by -1
            assert same_bits(scheduler.add_noise(*given), twin.add_noise(scheduler, *given))
        again = mk.patch(scheduler)
        assert not again.replaced and again.kept[0].already_patched
    assert vars(scheduler).keys() == vars(twin()).keys()
    assert all(map(same_bits, sampled(scheduler)[0], expected[0]))


def test_in_a_pipeline_and_by_family(twin):
    pipeline = types.SimpleNamespace(scheduler=twin(), unet=torch.nn.Linear(2, 2))
    with mk.patch(pipeline) as handle:
        assert [r.name for r in handle.replaced] == ["scheduler"]
    assert not mk.patch(pipeline, families="blocks").replaced
    with pytest.raises(TypeError, match=r"object must be an nn\.Module or a scheduler, or hold some, got int"):
        mk.patch(3)
    with pytest.raises(ValueError, match="noise must be one of torch, philox"):
        mk.patch(pipeline, noise="numpy")


def test_a_copy_steps_for_itself(twin):
    scheduler = twin()
    mk.patch(scheduler)
    other = copy.deepcopy(scheduler)
    assert other.step.scheduler is other
    assert all(map(same_bits, sampled(other)[0], sampled(scheduler)[0]))


def test_what_no_plan_serves_is_stock(twin):
    scheduler = twin()
    mk.patch(scheduler)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3)
    wide = scheduler.step(x[:1], 500, x)  # broadcast
    assert same_bits(wide.prev_sample, twin.step(scheduler, x[:1], 500, x).prev_sample)
    assert scheduler.step.fused == 0 and scheduler.step.calls == 1


@pytest.mark.parametrize("kind", ("step", "levels"))
def test_verification_notices_another_step(twin, kind):
    """A subclass is refused by name; a fork that computes something else under the same name is caught by its results."""
    if kind == "step":
        other = type("Mine", (twin,), {"step": lambda self, *a, **k: None})()
        reason = "Mine overrides DDIMScheduler.step"
    else:
        right = twin.step

        def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None,
                 variance_noise=None, return_dict=True):  # fmt: skip
            return tuple(1.001 * v for v in right(self, model_output, timestep, sample, return_dict=False))

        twin.step = step
        other, reason = twin(), "differs from stock by"
    handle = mk.patch(other)
    assert not handle.replaced and reason in handle.kept[0].reasons[0]
    assert "step" not in vars(other)


# -- diffusers itself -------------------------------------------------------------------------------------------------

CONFIGS = [
    {},
    {"prediction_type": "v_prediction"},
    {"thresholding": True},
    {"use_karras_sigmas": True},
    {"solver_order": 3},
    {"algorithm_type": "sde-dpmsolver++"},
    {"use_dynamic_shifting": True, "shift": 3.0},
    {"stochastic_sampling": True},
    {"timestep_spacing": "trailing"},
    {"variance_type": "learned_range"},
    {"set_alpha_to_one": False},
    {"sigma_schedule": "exponential"},
    {"clip_denoised": False},
    {"skip_prk_steps": True},
    # unshifted, a flow's first step magnifies a hundredfold, and stock's fp32 is 5e-5 away from fp64 for it
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0},
    {"clip_sample": True},
]
CASES = [(name, config) for name in DEFAULTS for config in CONFIGS if set(config) <= set(DEFAULTS[name])]


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize(("class_name", "config"), CASES, ids=str)
def test_runs_are_those_of_diffusers(diffusers, class_name, config):
    if class_name.startswith(("DPMSolver", "SASolver")) and "variance_type" in config:
        pytest.skip("it takes three channels of six by their numbers")
    if class_name in ("DEISMultistepScheduler", "SASolverScheduler") and "algorithm_type" in config:
        pytest.skip("it has other algorithms")
    scheduler = getattr(diffusers, class_name)(**config)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    expected = [sampled(scheduler, dtype) for dtype in dtypes]
    with mk.patch(scheduler, strict=True):
        for dtype, stock in zip(dtypes, expected, strict=True):
            found = sampled(scheduler, dtype)
            compared = 3 if dtype == torch.bfloat16 else len(stock[0])  # stock rounds every operation to 16 bits
            if dtype == torch.bfloat16 and class_name == "DEISMultistepScheduler" and "use_flow_sigmas" in config:
                # stock subtracts rounded samples that are magnified tenfold: it is what is far from the run in fp64
                far, near = (off(run[0], expected[1][0]) for run in (stock, found))
                assert near <= far / 4
            else:
                assert_near(found[0][:compared], stock[0][:compared], dtype)
            assert type(found[1]) is type(stock[1])
            assert dtypes_of(found[1]) == dtypes_of(stock[1])
        assert scheduler.step.fused == scheduler.step.calls == sum(len(stock[0]) for stock in expected)
        assert json.loads(scheduler.to_json_string())["_class_name"] == class_name
    assert all(map(same_bits, sampled(scheduler)[0], expected[0][0]))


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_an_instance_that_has_made_no_step_is_patched(diffusers, class_name):
    scheduler = getattr(diffusers, class_name)()
    with mk.patch(scheduler) as handle:
        assert "step" in vars(scheduler), handle.report()


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_configs_and_classes_are_those_of_diffusers(diffusers, class_name, tmp_path):
    stock, ours = getattr(diffusers, class_name), getattr(mk.schedulers, class_name)
    for method in ("step", "set_timesteps", "add_noise", "scale_noise", "scale_model_input", "get_velocity"):
        if hasattr(stock, method):
            same = [list(inspect.signature(getattr(c, method)).parameters) for c in (ours, stock)]
            assert same[0] == same[1]
    ours(num_train_timesteps=321).save_pretrained(tmp_path)
    assert stock.from_pretrained(tmp_path).config.num_train_timesteps == 321
    stock(num_train_timesteps=123).save_pretrained(tmp_path)
    assert ours.from_pretrained(tmp_path).config.num_train_timesteps == 123
