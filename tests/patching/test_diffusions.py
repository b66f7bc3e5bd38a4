"""mk.patch on diffusion objects that scripts bring along: the same numbers from the same seeds, and back to stock."""

import copy
import functools
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch

import mmgen_kernels as mk
from benchmarks.peers import openai_diffusion as script
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.patching import gaussian_diffusion_trial as trial
from mmgen_kernels.patching.gaussian_diffusion import METHODS

SHAPE = (4, 3, 8, 8)
BETAS = np.linspace(1e-3, 0.2, 100)
Spaced, Plain = script.SpacedDiffusion, script.GaussianDiffusion


@pytest.fixture(autouse=True)
def _verified(monkeypatch):
    monkeypatch.setattr(trial, "_verified", set())


def made(kind=Spaced, mean="EPSILON", variance="LEARNED_RANGE", loss="MSE", betas=BETAS, **options):
    if issubclass(kind, Spaced):
        options = {"use_timesteps": range(0, len(betas), 5)} | options
    kinds = (script.ModelMeanType[mean], script.ModelVarType[variance], script.LossType[loss])
    return kind(betas=betas, **dict(zip(("model_mean_type", "model_var_type", "loss_type"), kinds, strict=True)), **options)


class Model(torch.nn.Module):
    def __init__(self, learned=True, near=None):
        super().__init__()
        self.weight, self.learned, self.told, self.near = torch.nn.Parameter(torch.tensor([0.9, 0.01])), learned, [], near

    def forward(self, x, t, y=0.1):
        self.told.append(t)
        m = self.weight[0] * torch.tanh(x) + self.weight[1] * t.view(-1, 1, 1, 1) + y
        m = m if self.near is None else self.near + 0.02 * m
        return torch.cat((m, torch.sin(x)), 1) if self.learned else m


def numbers(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(diffusion, learned=True):
    """Everything that a script asks for, and what the model was told."""
    model, kwargs = Model(learned), {"model_kwargs": {"y": 0.2}}
    T = diffusion.num_timesteps
    t, x = torch.tensor([0, 1, T // 2, T - 1]), numbers(1)
    torch.manual_seed(0)
    found = {"x_t": diffusion.q_sample(x, t)}
    for name in ("p_sample", "ddim_sample", "ddim_reverse_sample"):
        found |= {f"{name} {key}": value for key, value in getattr(diffusion, name)(model, x, t, **kwargs).items()}
    student = Model(learned, None if diffusion.model_mean_type.name == "EPSILON" else x.clamp(-1, 1))
    terms = diffusion.training_losses(student, x.clamp(-1, 1), t, **kwargs)
    found |= terms | {"gradient": torch.autograd.grad(terms["loss"].mean(), student.weight)[0]}
    found["ancestral"] = diffusion.p_sample_loop(model, SHAPE, device="cpu", clip_denoised=True, **kwargs)
    found["ddim"] = diffusion.ddim_sample_loop(model, SHAPE, noise=x, eta=0.3, device="cpu", **kwargs)
    found["told"] = torch.cat([t.double() for t in model.told])
    return {name: value.detach() for name, value in found.items()} | {"next": torch.randn(3)}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=3e-4, atol=3e-5 * max(1, float(value.abs().max())), msg=name)
    assert torch.equal(found["next"], expected["next"])  # as many random numbers, in the same order
    assert torch.equal(found["told"], expected["told"])


MEANS, VARIANCES, LOSSES = (list(kinds.__members__) for kinds in (script.ModelMeanType, script.ModelVarType, script.LossType))


CASES = [(Spaced, *kinds) for kinds in itertools.product(MEANS, VARIANCES, LOSSES)]
CASES += [(Plain, mean, "LEARNED_RANGE", loss) for mean, loss in zip(MEANS, LOSSES, strict=False)]


@pytest.mark.parametrize(("kind", "mean", "variance", "loss"), CASES)
def test_the_same_numbers(kind, mean, variance, loss):
    diffusion, learned = made(kind, mean, variance, loss, rescale_timesteps=loss == "KL"), variance.startswith("LEARNED")
    before, expected = dict(vars(diffusion)), results(diffusion, learned)
    with mk.patch(diffusion, strict=True) as handle:
        assert [r.kind for r in handle.replaced] == [kind.__name__] and vars(diffusion).keys() - before.keys() == METHODS.keys()
        assert type(diffusion) is kind
        for name in METHODS:
            assert inspect.signature(getattr(diffusion, name)) == inspect.signature(getattr(kind, name).__get__(diffusion))
        assert_close(results(diffusion, learned), expected)
    assert vars(diffusion) == before
    assert all(map(same_bits, results(diffusion, learned).values(), expected.values()))


def test_report_and_second_patch():
    diffusion = made()
    handle = mk.patch({"diffusion": diffusion, "model": Model()})
    assert "replaced diffusion (SpacedDiffusion) by mk.GaussianDiffusion, verified" in handle.report()
    assert "falls back to stock when: an argument is given that only this script's method has" in handle.report()
    again = mk.patch(diffusion)
    assert not again.replaced and again.kept[0].already_patched
    handle.revert()
    assert not METHODS.keys() & vars(diffusion).keys()
    assert not mk.patch(diffusion.p_sample.__self__, families="schedule", verify=False).kept


def test_in_a_module():
    """As MAR's loss has two of them."""
    loss = torch.nn.Module()
    loss.net, loss.train_diffusion, loss.gen_diffusion = Model(), made(Plain), made()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), loss)
    with mk.patch(model) as handle:
        assert [r.name for r in handle.replaced] == ["1.train_diffusion", "1.gen_diffusion"]
    assert not mk.patch(model, families="vq").replaced


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))), ids=("deepcopy", "pickle"))
def test_a_copy_serves_itself(copied):
    diffusion = made()
    expected = results(diffusion)
    mk.patch(diffusion)
    other = copied(diffusion)
    assert other.p_sample.scheduler is other and other.p_sample.process is other.training_losses.process
    assert_close(results(other), expected)
    assert other.p_sample.as_it_was()


def test_philox():
    diffusion = made()
    mk.patch(diffusion, noise="philox", strict=True)
    x, t, model = numbers(1), torch.tensor([0, 3, 9, 19]), Model()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(diffusion.p_sample(model, x, t)["sample"])
    assert same_bits(runs[0], runs[1]) and not torch.equal(runs[0][1:], runs[2][1:])
    assert diffusion.training_losses(model, x, t)["loss"].isfinite().all()


# -- what is left to stock ----------------------------------------------------------------------------------------------


def tempered_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, temperature=1.0):
    """As MAR has it, with an argument more."""
    out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
    later = (t != 0).float().view(-1, 1, 1, 1)
    noise = torch.randn_like(x) * temperature
    return {"sample": out["mean"] + later * torch.exp(0.5 * out["log_variance"]) * noise, "pred_xstart": out["pred_xstart"]}


def test_an_argument_that_only_the_script_knows(monkeypatch):
    monkeypatch.setattr(Plain, "p_sample", tempered_sample)
    diffusion, x, t, model = made(), numbers(1), torch.tensor([0, 3, 9, 19]), Model()
    torch.manual_seed(1)
    expected = diffusion.p_sample(model, x, t, temperature=0.5)["sample"]
    with mk.patch(diffusion, strict=True):
        torch.manual_seed(1)
        assert same_bits(diffusion.p_sample(model, x, t, temperature=0.5)["sample"], expected)
        with Launches() as launches:
            diffusion.p_sample(model, x, t, temperature=1.0)
        assert launches.of("scheduler_step") == 1


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def of(self, name):
        return self.names.count(name)


def test_calls_that_stock_serves():
    diffusion, x, t, model = made(), numbers(1), torch.tensor([0, 3, 9, 19]), Model()
    wrapped = diffusion._wrap_model(model)
    outputs = {
        "classifier": lambda d: d.p_sample(model, x, t, cond_fn=lambda x, t, y=0: -x),
        "wrapped already": lambda d: d.ddim_sample(wrapped, x, t),
        "int32": lambda d: {"sample": d.q_sample(x, t.int())},
        "broadcast noise": lambda d: {"sample": d.q_sample(x, t, noise=x[:1])},
    }
    for name, call in outputs.items():
        torch.manual_seed(1)
        expected = call(diffusion)["sample"]
        with mk.patch(diffusion, strict=True), Launches() as launches:
            torch.manual_seed(1)
            found = call(diffusion)["sample"]
        assert same_bits(found, expected) and not launches.of("scheduler_step") and not launches.of("add_noise"), name


@pytest.mark.parametrize("change", (torch.Tensor.bfloat16, lambda x: x.clone().requires_grad_()), ids=("16 bits", "learned"))
def test_data_of_which_stock_makes_the_losses(change):
    """But for their x_t: that is q_sample's, which is ours."""
    diffusion, x, t, model = made(), change(numbers(1).clamp(-1, 1)), torch.tensor([0, 3, 9, 19]), Model()
    z = numbers(2).to(x.dtype)
    expected = diffusion.training_losses(model, x, t, noise=z)["loss"]
    with mk.patch(diffusion, strict=True), Launches() as launches:
        found = diffusion.training_losses(model, x, t, noise=z)["loss"]
    assert not launches.of("hybrid_loss") and found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_stock_refuses_is_refused_alike():
    diffusion, x, t, model = made(), numbers(1), torch.tensor([0, 3, 9, 19]), Model()
    for call in (
        lambda d: d.p_sample(model, x),
        lambda d: d.p_sample(model, x, t, 1, 2, 3, 4, 5, 6, 7),
        lambda d: d.p_sample(model, x, t, unknown=3),
        lambda d: d.p_sample(model, x, t, True, clip_denoised=True),
        lambda d: d.p_sample(Model(learned=False), x, t),
        lambda d: d.training_losses(Model(learned=False), x, t),
    ):
        with pytest.raises(Exception) as stock:
            call(diffusion)
        with mk.patch(diffusion, strict=True), pytest.raises(stock.type) as ours:
            call(diffusion)
        assert str(ours.value) == str(stock.value)


def test_whoever_comes_later_is_heard():
    diffusion, x, t, model = made(), numbers(1), torch.tensor([0, 3, 9, 19]), Model()
    handle, heard = mk.patch(diffusion), []
    stock = diffusion.p_mean_variance
    diffusion.p_mean_variance = lambda *args, **kwargs: heard.append(1) or stock(*args, **kwargs)
    diffusion.p_sample(model, x, t)
    assert heard == [1]
    del diffusion.p_mean_variance
    betas, diffusion.posterior_mean_coef1 = diffusion.posterior_mean_coef1, 2 * diffusion.posterior_mean_coef1
    with Launches() as launches:
        diffusion.p_sample(model, x, t)
    assert not launches.of("scheduler_step")
    diffusion.posterior_mean_coef1 = betas
    with Launches() as launches:
        diffusion.p_sample(model, x, t)
    assert launches.of("scheduler_step") == 1
    diffusion.q_sample = lambda *args, **kwargs: x
    with pytest.raises(RuntimeError, match=r"cannot revert what was replaced again since: SpacedDiffusion\.q_sample"):
        handle.revert()


# -- what is not adopted ------------------------------------------------------------------------------------------------


class Logged(Spaced):
    def training_losses(self, *args, **kwargs):
        return super().training_losses(*args, **kwargs)


class Weighted(Spaced):
    def _vb_terms_bpd(self, *args, **kwargs):
        out = super()._vb_terms_bpd(*args, **kwargs)
        return out | {"output": 2 * out["output"]}


class Thresholded(Plain):
    def p_mean_variance(self, *args, **kwargs):
        return super().p_mean_variance(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "left", "told"),
    (
        (Logged, {"training_losses"}, "Logged overrides GaussianDiffusion.training_losses"),
        (Weighted, {"training_losses"}, "Weighted overrides GaussianDiffusion._vb_terms_bpd"),
        (
            Thresholded,
            {"training_losses", "p_sample", "ddim_sample", "ddim_reverse_sample"},
            "Thresholded overrides GaussianDiffusion.p_mean_variance",
        ),
    ),
)
def test_what_a_subclass_overrides_is_left(kind, left, told):
    diffusion = made(kind)
    handle = mk.patch(diffusion)
    assert {k.name for k in handle.kept} == {f"{kind.__name__}.{name}" for name in left}
    assert all(k.reasons == (told,) for k in handle.kept)
    assert vars(diffusion).keys() & METHODS.keys() == METHODS.keys() - left
    assert_close(results(diffusion), results(made(kind)))


def other_loss(self, model, x_start, t, model_kwargs=None, noise=None):
    terms = STOCK["training_losses"](self, model, x_start, t, model_kwargs, noise)
    return terms | {"loss": terms["loss"] + 1e-3 * terms["mse"]}


def other_sample(self, *args, **kwargs):
    out = STOCK["p_sample"](self, *args, **kwargs)
    return out | {"sample": out["sample"] * 1.001}


def other_noise(self, x_start, t, noise=None):
    return STOCK["q_sample"](self, x_start, t, torch.randn(x_start.shape, dtype=torch.float64).float() if noise is None else noise)


STOCK = {name: vars(Plain)[name] for name in ("training_losses", "p_sample", "q_sample")}


@pytest.mark.parametrize(
    ("name", "function", "left"),
    (
        ("training_losses", other_loss, {"training_losses"}),
        ("q_sample", other_noise, {"q_sample"}),
    ),
)
def test_a_fork_that_computes_something_else_is_found_out(monkeypatch, name, function, left):
    monkeypatch.setattr(Plain, name, function)
    handle = mk.patch(made())
    assert {k.name.split(".")[1] for k in handle.kept} == left
    assert "differs" in handle.kept[0].reasons[0]


def test_other_forks(monkeypatch):
    diffusion = made()
    diffusion.alphas_cumprod = diffusion.alphas_cumprod * 0.99
    assert "alphas_cumprod does not follow from its betas" in mk.patch(diffusion).report()
    diffusion = made()
    diffusion.model_mean_type = type("Kind", (), {"name": "VELOCITY"})()
    assert "model_mean_type must be a member of ModelMeanType" in mk.patch(diffusion).report()
    assert "it is mk.GaussianDiffusion itself" in mk.patch(mk.create_diffusion("10")).report()
    diffusion = made()
    diffusion.p_sample = functools.partial(Plain.p_sample, diffusion)
    handle = mk.patch(diffusion)
    assert [k.reasons for k in handle.kept] == [("p_sample was already replaced on the instance",)]
    handle.revert()
    monkeypatch.setattr(Plain, "ddim_reverse_sample", lambda self, net, x, t: None)
    assert "ddim_reverse_sample takes net, x, t, which is not what we know" in mk.patch(made()).report()
    monkeypatch.setattr(Plain, "p_sample", other_sample)
    assert "p_sample takes args, kwargs, which is not what we know" in mk.patch(made()).report()
    with pytest.raises(RuntimeError, match="strict=True, and kept as they were"):
        mk.patch(made(), strict=True)


def test_verified_once_and_quickly(monkeypatch):
    runs = []
    stock = trial.compared
    monkeypatch.setattr(trial, "compared", lambda *args: runs.append(1) or stock(*args))
    betas = np.linspace(1e-4, 0.02, 1000)
    mk.patch(made(Plain, betas=betas), strict=True)
    count = len(runs)
    mk.patch(made(Plain, betas=betas), strict=True)
    assert count > 10 and len(runs) == count
    mk.patch(made(Plain, betas=betas * 0.9), strict=True)
    assert len(runs) == 2 * count
    state = torch.random.get_rng_state()
    mk.patch(made(use_timesteps=range(7)))
    assert torch.equal(state, torch.random.get_rng_state())
