from inspect import signature
from types import SimpleNamespace

import pytest
import torch

import mmgen_kernels as mk
from mmgen.diffusion import Objective, ObjectiveConfig, sample
from mmgen_kernels import schedulers

CPU = torch.device("cpu")
KEY = torch.tensor([3, 0])
POINT = torch.linspace(-1, 1, 2 * 4 * 4).view(1, 2, 4, 4)
LABELS = torch.zeros(6, dtype=torch.int64)
DDPM = ObjectiveConfig(target="epsilon", times="uniform")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def alphas_cumprod() -> torch.Tensor:
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)).cumprod(0).double()


class Oracle:
    """The best model there is where all data of label y are the picture (y + 1) POINT, and of no label zero."""

    no_label = 9
    config = SimpleNamespace(in_channels=2, input_size=4)

    def __init__(self, target: str = "flow"):
        self.target = target
        self.asked: list[torch.Tensor] = []

    def __call__(self, x, t, y):
        self.asked.append(t)
        x0 = torch.where(y == self.no_label, 0, y + 1)[:, None, None, None] * POINT.to(x.dtype)
        t = t.double()[:, None, None, None]
        if self.target == "flow":
            return ((x - x0) / (t / 1000)).to(x.dtype)
        a = alphas_cumprod()[t.round().long().clamp(0, 999)]
        z = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return {"epsilon": z, "sample": x0 + 0 * z, "v": a.sqrt() * z - (1 - a).sqrt() * x0}[self.target].to(x.dtype)


def pictures(size: int = 5) -> torch.Tensor:
    return torch.rand(size, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_flow_is_a_straight_line_from_data_to_noise():
    objective, x0 = Objective(ObjectiveConfig(), CPU), pictures()
    x_t, target, timesteps = objective.noised(x0, KEY)
    t = (timesteps / 1000)[:, None, None, None]
    z = mk.philox_normal(x0.shape, mk.fold_in(KEY, 0))
    torch.testing.assert_close(x_t, (1 - t) * x0 + t * z)
    torch.testing.assert_close(target, z - x0)
    assert timesteps.min() > 0 and timesteps.max() < 1000


@pytest.mark.parametrize("target", ["epsilon", "v", "sample"])
def test_ddpm_noises_by_its_betas(target):
    objective, x0 = Objective(ObjectiveConfig(target=target, times="uniform"), CPU), pictures()
    x_t, wanted, timesteps = objective.noised(x0, KEY)
    a = alphas_cumprod()[timesteps][:, None, None, None]
    z = mk.philox_normal(x0.shape, mk.fold_in(KEY, 0)).double()
    torch.testing.assert_close(x_t.double(), a.sqrt() * x0 + (1 - a).sqrt() * z, atol=1e-5, rtol=1e-5)
    expected = {"epsilon": z, "sample": x0.double(), "v": a.sqrt() * z - (1 - a).sqrt() * x0}[target]
    torch.testing.assert_close(wanted.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["epsilon", "sample"])
def test_a_learned_variance_is_trained_by_its_bound(target):
    """As GaussianDiffusion has it, with the same times and noise; of a flow the second half of channels has no part."""

    def model(x, t, y=None):
        m = x * 0.9 if target == "sample" else torch.tanh(x)
        return torch.cat((m, torch.sin(2 * x)), 1)

    objective, x0 = Objective(ObjectiveConfig(target=target, times="uniform"), CPU), pictures()
    a = alphas_cumprod()
    betas = 1 - a / torch.cat((a.new_ones(1), a[:-1]))
    kinds = {"model_mean_type": {"epsilon": "epsilon", "sample": "start_x"}[target], "model_var_type": "learned_range"}
    t, z = objective.noised(x0, KEY)[2], mk.philox_normal(x0.shape, mk.fold_in(KEY, 0))
    expected = mk.GaussianDiffusion(betas=betas, loss_type="mse", **kinds).training_losses(model, x0, t, noise=z)
    torch.testing.assert_close(objective.loss(model, x0, LABELS, KEY), expected["loss"].mean(), rtol=1e-4, atol=1e-5)
    assert expected["vb"].mean() > 0
    flow = Objective(ObjectiveConfig(), CPU)
    halves = [flow.loss(lambda x, t, y, f=f: f(model(x, t)), x0, LABELS, KEY) for f in (lambda o: o, lambda o: o[:, :2])]
    assert torch.equal(*halves)


def test_times_are_spread_as_the_configuration_says():
    def times(**options):
        return Objective(ObjectiveConfig(**options), CPU).times(20000, KEY)

    logit = times().logit()
    assert logit.mean().item() == pytest.approx(0, abs=0.03) and logit.std().item() == pytest.approx(1, abs=0.03)
    uniform = times(times="uniform")
    assert uniform.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    table = times(target="v", times="uniform")
    assert (table.dtype, table.min().item(), table.max().item()) == (torch.int64, 0, 999)


@pytest.mark.parametrize("target", ["flow", *PREDICTIONS])
def test_only_the_right_model_has_no_loss_and_the_key_is_all_that_is_drawn(target):
    objective = Objective(ObjectiveConfig(target=target, times="logit_normal" if target == "flow" else "uniform"), CPU)
    data = POINT.expand(6, -1, -1, -1)
    assert objective.loss(Oracle(target), data, LABELS, KEY) < 1e-6

    def wavy(x, t, y):
        return Oracle(target)(x, t, y) + torch.sin(x)

    wrong = [objective.loss(wavy, data, LABELS, mk.fold_in(KEY, i)).item() for i in (0, 0, 1)]
    assert wrong[0] == wrong[1] != wrong[2]
    assert min(wrong) > 1e-3


def test_the_loss_leaves_the_channels_of_the_variance_alone():
    def both(x, t, y):
        return torch.cat([Oracle()(x, t, y), torch.full_like(x, 1e6)], dim=1)

    assert Objective(ObjectiveConfig(), CPU).loss(both, POINT.expand(6, -1, -1, -1), LABELS, KEY) < 1e-6


NAMED = [
    ("FlowMatchEulerDiscreteScheduler", "flow", {}),
    ("FlowMatchEulerDiscreteScheduler", "flow", {"shift": 3.0, "stochastic_sampling": True}),
    ("DPMSolverMultistepScheduler", "epsilon", {}),
    ("UniPCMultistepScheduler", "v", {}),
    ("EulerDiscreteScheduler", "epsilon", {}),
    ("EulerAncestralDiscreteScheduler", "v", {}),
    ("DDIMScheduler", "sample", {"clip_sample": False}),
    ("DDPMScheduler", "epsilon", {"clip_sample": True}),
]


def config_of(target: str, options: dict) -> dict:
    return options if target == "flow" else DDPM.betas | {"prediction_type": PREDICTIONS[target]} | options


@pytest.mark.parametrize(("name", "target", "options"), NAMED)
@pytest.mark.parametrize("as_object", [False, True])
def test_every_sampler_finds_the_only_picture(name, target, options, as_object):
    config = config_of(target, options)
    sampler = getattr(schedulers, name)(**config) if as_object else (name, config)
    found = sample(Oracle(target), LABELS, sampler, 12, key=KEY)
    torch.testing.assert_close(found, POINT.expand(6, -1, -1, -1), atol=0.02, rtol=0)


@pytest.mark.parametrize(("name", "target", "options"), [row for row in NAMED if row[2].get("stochastic_sampling") is None][:4])
def test_tables_and_objects_give_the_same_samples(name, target, options):
    class Wavy(Oracle):
        def __call__(self, x, t, y):
            return super().__call__(x, t, y) + 0.3 * torch.sin(3 * x + y[:, None, None, None])

    config = config_of(target, options)
    labels = torch.tensor([0, 1, 2])
    from_table = sample(Wavy(target), labels, (name, config), 9, key=KEY, guidance_scale=2.0)
    from_object = sample(Wavy(target), labels, getattr(schedulers, name)(**config), 9, key=KEY, guidance_scale=2.0)
    torch.testing.assert_close(from_table, from_object, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", [n for n in schedulers.__all__ if n.endswith("Scheduler")])
def test_a_table_samples_as_its_class_does_or_is_refused(name):
    """Of every class that takes an epsilon; those whose steps read more than the operator takes are refused by name."""
    config = DDPM.betas | {"prediction_type": "epsilon"} | ({"solver_order": 3} if "Solver" in name or "DEIS" in name else {})
    labels = torch.tensor([0, 1])
    try:
        plan = schedulers.plan(name, config, num_inference_steps=9)
        expected = getattr(schedulers, name)(**config)
    except (TypeError, ValueError, NotImplementedError):
        return  # a flow, or a model's own scale
    if plan.channels is not None or "timestep_back" in signature(expected.step).parameters:
        return
    try:
        from_table = sample(Oracle("epsilon"), labels, (name, config), 9, key=KEY)
    except ValueError as error:
        assert str(error).startswith(f"{name} has steps of more than 5 inputs: give it as an object, mk.schedulers.{name}(")
        assert len(plan.inputs) > 5
        return
    if not any(plan.draws_noise) and name != "TCDScheduler":  # whose step takes eta = 0.3, and a plan 0
        torch.testing.assert_close(from_table, sample(Oracle("epsilon"), labels, expected, 9, key=KEY), atol=2e-3, rtol=2e-3)
    assert from_table.isfinite().all()


@pytest.mark.parametrize("target", PREDICTIONS | {"flow": None})
@pytest.mark.parametrize("name", [n for n in schedulers.__all__ if n.endswith("Scheduler")])
def test_a_scheduler_by_its_name_finds_the_only_picture(name, target):
    config = ObjectiveConfig(target=target, times="logit_normal" if target == "flow" else "uniform")
    try:
        found = sample(Oracle(target), LABELS, config.scheduler_named(name), 20, key=KEY)
    except ValueError as error:
        assert str(error).startswith(("--scheduler must sample models", "--scheduler must be one of", "prediction_type"))
        return
    # off by 0.160 and 0.144 after 20 steps, by 0.062 and 0.052 after 50
    slow = name in ("DEISMultistepScheduler", "SASolverScheduler") and target == "flow"
    torch.testing.assert_close(found, POINT.expand(6, -1, -1, -1), atol=0.2 if slow else 0.06, rtol=0)


def test_guidance_goes_beyond_the_label():
    model = Oracle()
    found = sample(model, LABELS + 1, ObjectiveConfig().scheduler, 4, key=KEY, guidance_scale=1.5)
    torch.testing.assert_close(found, 3 * POINT.expand(6, -1, -1, -1), atol=1e-4, rtol=0)  # 0 + 1.5 (2 - 0)
    assert [t.tolist() for t in model.asked] == [[1000.0 - 333.0 * i] * 12 for i in range(4)]


@pytest.mark.parametrize(("name", "target", "options"), [NAMED[0], NAMED[1], NAMED[7]])
def test_a_sample_is_the_same_however_many_are_drawn(name, target, options):
    class Wavy(Oracle):
        def __call__(self, x, t, y):
            return super().__call__(x, t, y) + torch.sin(x)

    few, many = (sample(Wavy(target), LABELS[:n], (name, config_of(target, options)), 5, key=KEY) for n in (2, 6))
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(few, sample(Wavy(target), LABELS[:2], (name, config_of(target, options)), 5, key=KEY + 1))


class Learned(Oracle):
    def __init__(self, v):
        super().__init__("epsilon")
        self.v = v

    def __call__(self, x, t, y):
        mean = super().__call__(x, t, y) + torch.sin(x)
        return torch.cat([mean, torch.full_like(x, self.v)], dim=1)


def test_a_learned_variance_reaches_from_the_least_to_the_greatest():
    def draw(v, variance_type):
        config = DDPM.betas | {"variance_type": variance_type, "clip_sample": False}
        return sample(Learned(v), LABELS, ("DDPMScheduler", config), 8, key=KEY)

    torch.testing.assert_close(draw(-1.0, "learned_range"), draw(0.0, "fixed_small"))
    torch.testing.assert_close(draw(1.0, "learned_range"), draw(0.0, "fixed_large"))
    assert (draw(1.0, "learned_range") - draw(-1.0, "learned_range")).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize(("v", "fixed"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_ddpm_by_its_name_reads_a_learned_variance(v, fixed, guidance_scale):
    def draw(sampler):
        return sample(Learned(v), LABELS, sampler, 8, key=KEY, guidance_scale=guidance_scale)

    wanted = schedulers.DDPMScheduler(**DDPM.betas, variance_type=fixed, clip_sample=False)
    torch.testing.assert_close(draw(DDPM.scheduler_named("DDPMScheduler", learn_sigma=True)), draw(wanted))


@pytest.mark.parametrize("as_object", [False, True])
def test_a_variance_that_the_model_does_not_say_is_missed(as_object):
    config = DDPM.betas | {"variance_type": "learned_range"}
    sampler = schedulers.DDPMScheduler(**config) if as_object else ("DDPMScheduler", config)
    with pytest.raises(ValueError, match=r"scheduler must not read a variance, .* got variance_type='learned_range'"):
        sample(Oracle("epsilon"), LABELS, sampler, 2, key=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "score"}, "target must be one of flow, epsilon, v, sample, got 'score'"),
        ({"times": "cosine"}, "times must be one of uniform, logit_normal, got 'cosine'"),
        ({"target": "v"}, "times must be 'uniform' with target 'v', got 'logit_normal'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_trained_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**options)
