"""mk.patch on diffusion objects that scripts bring along: the same numbers from the same seeds, and back to stock."""

import copy
import functools
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
from called import Called

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
    assert other.p_sample.as_it_was({})


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
    return hotter(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, temperature)


def hotter(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, heat):
    out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
    later = (t != 0).float().view(-1, 1, 1, 1)
    noise = torch.randn_like(x) * heat
    if cond_fn is not None:
        out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
    return {"sample": out["mean"] + later * torch.exp(0.5 * out["log_variance"]) * noise, "pred_xstart": out["pred_xstart"]}


def tempered_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                  device=None, progress=False, temperature=1.0):  # fmt: skip
    x = torch.randn(*shape, device=device) if noise is None else noise
    for i in reversed(range(self.num_timesteps)):
        t = torch.tensor([i] * shape[0], device=device)
        with torch.no_grad():
            out = self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, temperature=temperature)
        yield out
        x = out["sample"]


@pytest.mark.parametrize("variance", ("LEARNED_RANGE", "FIXED_SMALL"))
def test_the_temperature_of_mar(monkeypatch, variance):
    monkeypatch.setattr(Plain, "p_sample", tempered_sample)
    monkeypatch.setattr(Plain, "p_sample_loop_progressive", tempered_loop)
    diffusion, x, t, model = made(variance=variance), numbers(1), torch.tensor([0, 3, 9, 19]), Model(variance != "FIXED_SMALL")

    def run():
        torch.manual_seed(1)
        steps = [
            diffusion.p_sample(model, x, t, temperature=heat, cond_fn=cond_fn) for heat in (0.5, 1) for cond_fn in (None, guide)
        ]
        steps += list(diffusion.p_sample_loop_progressive(model, SHAPE, device="cpu", temperature=0.9))
        return [of for step in steps for of in step.values()] + [torch.randn(3)]

    expected = run()
    with mk.patch(diffusion, strict=True), Called() as called:
        found = run()
    assert called.names.count("scheduler_step") == 4 + 20 + (2 if variance == "LEARNED_RANGE" else 0)
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=3e-4, atol=3e-5 * max(1, float(stock.abs().max())))


def test_a_temperature_that_means_something_else(monkeypatch):
    """It is learned by trying: here the deviation goes with its square, and stock code serves those calls."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, temperature=1.0):
        return hotter(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, temperature**2)

    monkeypatch.setattr(Plain, "p_sample", p_sample)
    same_as_stock_s(lambda d, *at: d.p_sample(*at, temperature=0.5), lambda d, *at: d.p_sample(*at, temperature=1))


def test_an_argument_that_only_the_script_knows(monkeypatch):
    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, strength=1.0):
        return hotter(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, strength)

    monkeypatch.setattr(Plain, "p_sample", p_sample)
    same_as_stock_s(lambda d, *at: d.p_sample(*at, strength=0.5), lambda d, *at: d.p_sample(*at, strength=1.0))


def same_as_stock_s(of_stock, of_ours):
    """The first call has stock's bits and no operator of ours; the second has one."""
    diffusion, x, t, model = made(), numbers(1), torch.tensor([0, 3, 9, 19]), Model()
    torch.manual_seed(1)
    expected = of_stock(diffusion, model, x, t)["sample"]
    with mk.patch(diffusion, strict=True):
        torch.manual_seed(1)
        with Called() as called:
            assert same_bits(of_stock(diffusion, model, x, t)["sample"], expected)
        assert "scheduler_step" not in called.names
        with Called() as called:
            of_ours(diffusion, model, x, t)
        assert called.names.count("scheduler_step") == 1


# -- guidance by a classifier -------------------------------------------------------------------------------------------


def guide(x, t, y=0.1):
    """Of 16 bits where x is, as a classifier's gradient: and of what it is told."""
    return torch.sin(3 * x + y) + torch.cos(t.float()).view(-1, 1, 1, 1).to(x.dtype)


@pytest.mark.parametrize("kind", (Plain, Spaced))
@pytest.mark.parametrize(
    ("mean", "variance"), (("EPSILON", "LEARNED_RANGE"), ("START_X", "FIXED_LARGE"), ("PREVIOUS_X", "LEARNED"))
)
def test_guided_by_a_classifier(kind, mean, variance):
    diffusion, learned = made(kind, mean, variance, rescale_timesteps=True), variance.startswith("LEARNED")
    T, x, model = diffusion.num_timesteps, numbers(1), Model(learned)
    t, kwargs = torch.tensor([0, 1, T // 2, T - 1]), {"cond_fn": guide, "model_kwargs": {"y": 0.2}}

    def run():
        torch.manual_seed(3)
        names = ("p_sample", "ddim_sample", "ddim_reverse_sample")
        steps = [getattr(diffusion, name)(model, x, t, clip_denoised=clip, **kwargs) for name in names for clip in (True, False)]
        steps.append(diffusion.ddim_sample(model, x, t, eta=0.7, **kwargs))
        steps += itertools.islice(diffusion.p_sample_loop_progressive(model, SHAPE, device="cpu", **kwargs), 3)
        return [of for step in steps for of in step.values()] + [torch.randn(3)]

    expected = run()
    with mk.patch(diffusion, strict=True), Called() as called:
        found = run()
    assert called.names.count("scheduler_step") == 10 + (5 if learned else 0)  # one more: a gradient weighed by a learned variance
    for ours, stock in zip(found, expected, strict=True):
        assert ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4 * max(1, float(stock.abs().max())))


def test_a_classifier_in_16_bits_is_as_near_to_fp64_as_stock_s():
    diffusion, x, t = made(), numbers(1).bfloat16(), torch.tensor([0, 3, 9, 19])
    given = torch.cat((numbers(2), numbers(3).tanh()), 1).bfloat16()

    def run(to):
        torch.manual_seed(3)
        z = torch.randn_like(x).to(to)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda *args, **kwargs: z)
            model, cond_fn = (lambda *args: given.to(to)), (lambda *args: 5 * x.to(to))
            out = diffusion.p_sample(model, x.to(to), t, clip_denoised=False, cond_fn=cond_fn)
        return out["sample"].double()

    exact, stock = run(torch.float64), run(torch.bfloat16)
    with mk.patch(diffusion, strict=True), Called() as called:
        ours = run(torch.bfloat16)
    assert called.names.count("scheduler_step") == 2
    assert (ours - exact).square().mean() <= (stock - exact).square().mean()


def test_a_classifier_that_stock_serves(monkeypatch):
    """One told something else than the model is, one that is wrapped already, x of 64 bits, and guidance that came later."""

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        return p_mean_var["mean"] + p_mean_var["variance"] * cond_fn(x, t // 2, **(model_kwargs or {}))

    monkeypatch.setattr(Plain, "condition_mean", condition_mean)
    same_as_stock_s(lambda d, *at: d.p_sample(*at, cond_fn=guide), lambda d, *at: d.ddim_sample(*at, cond_fn=guide))
    monkeypatch.undo()
    monkeypatch.setattr(trial, "_verified", set())
    same_as_stock_s(lambda d, *at: d.p_sample(*at, cond_fn=d._wrap_model(guide)), lambda d, *at: d.p_sample(*at))
    same_as_stock_s(lambda d, m, x, t: d.ddim_sample(m, x.double(), t, cond_fn=guide), lambda d, *at: d.ddim_sample(*at))
    diffusion, x, t = made(), numbers(1), torch.tensor([0, 3, 9, 19])
    mk.patch(diffusion, strict=True)
    diffusion.condition_score = lambda cond_fn, out, x, t, model_kwargs=None: out
    with Called() as called:
        diffusion.ddim_sample(Model(), x, t, cond_fn=guide)
    assert "scheduler_step" not in called.names


def test_calls_that_stock_serves():
    diffusion, x, t, model = made(), numbers(1), torch.tensor([0, 3, 9, 19]), Model()
    wrapped = diffusion._wrap_model(model)
    outputs = {
        "wrapped already": lambda d: d.ddim_sample(wrapped, x, t),
        "int32": lambda d: {"sample": d.q_sample(x, t.int())},
        "broadcast noise": lambda d: {"sample": d.q_sample(x, t, noise=x[:1])},
    }
    for name, call in outputs.items():
        torch.manual_seed(1)
        expected = call(diffusion)["sample"]
        with mk.patch(diffusion, strict=True), Called() as called:
            torch.manual_seed(1)
            found = call(diffusion)["sample"]
        assert same_bits(found, expected) and "scheduler_step" not in called.names and "add_noise" not in called.names, name


@pytest.mark.parametrize("loss", ("MSE", "KL"))
@pytest.mark.parametrize("variance", ("LEARNED_RANGE", "FIXED_SMALL"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_losses_of_16_bits_are_as_near_to_fp64_as_stock_s(dtype, variance, loss):
    """Stock takes 0.999, the edge of the last level, for 1 in bf16, and squares and adds up there."""
    diffusion, t = made(variance=variance, loss=loss), torch.tensor([0, 1, 9, 19])
    x, z, m, v = ((numbers(i) * 1.5).to(dtype) for i in range(4))
    x = x.clamp(-1, 1)
    output = torch.cat((m, v.tanh()), 1) if variance.startswith("LEARNED") else m

    def losses(to, of_output):
        terms = diffusion.training_losses(lambda *args: output.to(of_output), x.to(to), t, noise=z.to(to))
        return {name: value.double() for name, value in terms.items()}

    for of_output in (dtype, torch.float32):
        exact, stock = losses(torch.float64, torch.float64), losses(dtype, of_output)
        with mk.patch(diffusion, strict=True), Called() as called:
            ours = losses(dtype, of_output)
        assert called.names.count("hybrid_loss") + called.names.count("diffusion_loss") == 1 and ours.keys() == exact.keys()
        for name, value in exact.items():
            far = (stock[name] - value).abs().mean()
            assert (ours[name] - value).abs().mean() <= far + 1e-5 * value.abs().mean(), (name, of_output)


def test_data_of_which_stock_makes_the_losses():
    """But for their x_t: that is q_sample's, which is ours."""
    diffusion, x, t, model = made(), numbers(1).clamp(-1, 1).requires_grad_(), torch.tensor([0, 3, 9, 19]), Model()
    z = numbers(2).to(x.dtype)
    expected = diffusion.training_losses(model, x, t, noise=z)["loss"]
    with mk.patch(diffusion, strict=True), Called() as called:
        found = diffusion.training_losses(model, x, t, noise=z)["loss"]
    assert "hybrid_loss" not in called.names and found.requires_grad
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
    with Called() as called:
        diffusion.p_sample(model, x, t)
    assert "scheduler_step" not in called.names
    diffusion.posterior_mean_coef1 = betas
    with Called() as called:
        diffusion.p_sample(model, x, t)
    assert called.names.count("scheduler_step") == 1
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
