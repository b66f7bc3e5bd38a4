"""mk.GaussianDiffusion against the formulas in fp64, against data whose best model is known, and against scripts' seeds."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

import mmgen_kernels as mk
from benchmarks.peers import openai_diffusion as script
from mmgen_kernels.battery import tolerance
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.schedule import gaussian_diffusion as ours

T, B, SHAPE = 40, 5, (5, 3, 4, 6)
MEANS, VARIANCES, LOSSES = (list(kinds) for kinds in (script.ModelMeanType, script.ModelVarType, script.LossType))
RESPACINGS = (None, "7", "ddim10", [2, 3, 1])
KINDS = list(itertools.product(MEANS, VARIANCES))
CALLS = (("p_sample", {}), ("ddim_sample", {"eta": 0.0}), ("ddim_sample", {"eta": 0.7}), ("ddim_reverse_sample", {}))


def of(kind):
    return kind.name if hasattr(kind, "name") else str(kind)


def pair(mean="EPSILON", variance="LEARNED_RANGE", loss="MSE", respacing=None, steps=T, schedule="linear", **options):
    """Ours and the script's, in fp64."""
    kinds = {
        "betas": ours.get_named_beta_schedule(schedule, steps).numpy(),
        "model_mean_type": script.ModelMeanType[of(mean)],
        "model_var_type": script.ModelVarType[of(variance)],
        "loss_type": script.LossType[of(loss)],
        "rescale_timesteps": options.pop("rescale_timesteps", False),
    }
    kept = set(range(steps)) if respacing is None else ours.space_timesteps(steps, respacing)
    stock = script.SpacedDiffusion(kept, **kinds)
    stock.precision = torch.float64
    return mk.GaussianDiffusion(use_timesteps=kept, **kinds, **options), stock


def numbers(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pictures(seed=1, shape=SHAPE, dtype=torch.float64):
    """256 levels, the two outer ones among them."""
    return ((numbers(seed, shape).clamp(-1.2, 1.2).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1).to(dtype)


class Model(torch.nn.Module):
    """A function of what it is told, in x's dtype; around `near`, as models are: far from the data, the first term of the bound is
    a difference of numbers near 1 in the formulas as they stand."""

    def __init__(self, variance, dtype=torch.float64, near=None):
        super().__init__()
        self.near = near
        self.weight = torch.nn.Parameter(torch.tensor([0.7, 0.2, -0.3], dtype=dtype))
        self.learned, self.told = of(variance).startswith("LEARNED"), []

    def forward(self, x, t, shift=0.1):
        self.told.append(t)
        assert t.shape == x.shape[:1]
        time = t.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) / T
        m = self.weight[0] * torch.tanh(x) + self.weight[1] * time + shift
        m = m if self.near is None else self.near + 0.02 * m
        return torch.cat((m, torch.sin(3 * x) * self.weight[2] - 0.5), 1) if self.learned else m


def close(found, expected, factor=1.0):
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        largest = float(value.detach().abs().max().clamp(min=1))
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=factor * 1e-11 * largest)


def timesteps(diffusion):
    """Of every sample another one, 0 and the last among them."""
    return torch.linspace(0, diffusion.num_timesteps - 1, B).long()


# -- each call against fp64 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", RESPACINGS, ids=str)
@pytest.mark.parametrize(("mean", "variance"), KINDS, ids=of)
def test_every_update(mean, variance, respacing):
    d, stock = pair(mean, variance, respacing=respacing)
    x, t, model = numbers(3), timesteps(d), Model(variance)
    limits = [{"clip_denoised": clip, "denoised_fn": f} for clip in (True, False) for f in (None, lambda x: x.sin())]
    guides = [None, lambda x, t, shift: shift - x * t.to(x.dtype).view(-1, 1, 1, 1) / T]
    for limit, cond_fn in itertools.product(limits, guides):
        options = limit | {"model_kwargs": {"shift": 0.3}}
        if cond_fn is None:
            close(d.p_mean_variance(model, x, t, **options), stock.p_mean_variance(model, x, t, **options))
        options |= {"cond_fn": cond_fn}
        for name, more in CALLS:
            torch.manual_seed(5)
            found, left = getattr(d, name)(model, x, t, **options, **more), torch.random.get_rng_state()
            torch.manual_seed(5)
            close(found, getattr(stock, name)(model, x, t, **options, **more))
            assert torch.equal(left, torch.random.get_rng_state()), name  # as many normals


@pytest.mark.parametrize("respacing", RESPACINGS[:2], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=of)
@pytest.mark.parametrize(("mean", "variance"), KINDS, ids=of)
def test_every_loss(mean, variance, loss, respacing):
    d, stock = pair(mean, variance, loss, respacing)
    x, t, noise = pictures(), timesteps(d), numbers(4)
    found, expected = [], []
    for diffusion, results in ((d, found), (stock, expected)):
        model = Model(variance, near=None if mean.name == "EPSILON" else x)
        terms = diffusion.training_losses(model, x, t, {"shift": 0.2}, noise=noise)
        terms["loss"].sum().backward()
        results += [terms, model.weight.grad]
    assert found[0].keys() == expected[0].keys() and all(v.shape == (B,) for v in found[0].values())
    close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variance", VARIANCES, ids=of)
@pytest.mark.parametrize("clip", (True, False))
def test_bits_per_dimension(variance, clip):
    d, stock = pair("EPSILON", variance, respacing="6")
    results = []
    for diffusion in (d, stock):
        torch.manual_seed(1)
        results.append(diffusion.calc_bpd_loop(Model(variance), pictures(), clip_denoised=clip, model_kwargs={"shift": 0.0}))
    close(*results)


def test_q():
    d, stock = pair()
    x, z, t = pictures(), numbers(2), timesteps(d)
    torch.testing.assert_close(d.q_sample(x, t, z), stock.q_sample(x, t, z), rtol=1e-12, atol=1e-12)
    for name, given in (("q_mean_variance", (x, t)), ("q_posterior_mean_variance", (x, z, t))):
        for found, expected in zip(getattr(d, name)(*given), getattr(stock, name)(*given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    close(
        d.condition_score(lambda x, t: x, d.p_mean_variance(Model("LEARNED_RANGE"), z, t), z, t),
        stock.condition_score(lambda x, t: x, stock.p_mean_variance(Model("LEARNED_RANGE"), z, t), z, t),
    )
    found = d.condition_mean(lambda x, t: x, d.p_mean_variance(Model("LEARNED_RANGE"), z, t), z, t)
    expected = stock.condition_mean(lambda x, t: x, stock.p_mean_variance(Model("LEARNED_RANGE"), z, t), z, t)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# -- trajectories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", RESPACINGS, ids=str)
@pytest.mark.parametrize(("name", "more"), (("p_sample", {}), ("ddim_sample", {}), ("ddim_sample", {"eta": 0.5})), ids=str)
@pytest.mark.parametrize("mean", MEANS, ids=of)
def test_trajectories(mean, name, more, respacing):
    d, stock = pair(mean, respacing=respacing, rescale_timesteps=True)
    runs, told = [], []
    for diffusion in (d, stock):
        model = Model("LEARNED_RANGE")
        torch.manual_seed(2)
        loop = getattr(diffusion, f"{name}_loop_progressive")
        options = {"clip_denoised": True, "model_kwargs": {"shift": 0.3}, **more}
        runs.append(list(loop(model, SHAPE, noise=numbers(7), device="cpu", **options)))
        told.append(torch.stack(model.told))
        torch.manual_seed(2)
        final = getattr(diffusion, f"{name}_loop")(model, SHAPE, noise=numbers(7), device="cpu", **options)
        assert torch.equal(final, runs[-1][-1]["sample"])
    assert torch.equal(*told) and told[0].dtype == told[1].dtype and len(runs[0]) == d.num_timesteps
    for found, expected in zip(*runs, strict=True):
        close(found, expected, factor=100)


def test_the_same_seed_gives_the_same_pictures():
    """Normals at the start and in each step are the script's, drawn in its order."""
    d, stock = pair(respacing="5", mean="START_X")
    stock.precision = torch.float32
    finals = []
    for diffusion in (d, stock):
        torch.manual_seed(11)
        model, x = Model("LEARNED_RANGE", torch.float32), pictures(dtype=torch.float32)
        finals.append(diffusion.p_sample_loop(model, SHAPE, device=None))
        finals.append(diffusion.ddim_sample_loop(model, SHAPE))
        finals.append(diffusion.training_losses(model, x, timesteps(d))["mse"])
        finals.append(torch.randn(3))
    for found, expected in zip(finals[:4], finals[4:], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    assert torch.equal(finals[3], finals[7])


def test_a_bar_of_progress(capsys):
    pytest.importorskip("tqdm")
    d, _ = pair(respacing="5")
    d.p_sample_loop(Model("LEARNED_RANGE", torch.float32), SHAPE, progress=True)
    assert "5/5" in capsys.readouterr().err


# -- fp32 and 16 bits, by the law of the battery ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("p_sample", "ddim_sample", "ddim_reverse_sample", "training_losses"))
@pytest.mark.parametrize("mean", MEANS, ids=of)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rounding(name, mean, dtype):
    shape = (B, 4, 16, 16)
    d, stock = pair(mean, steps=1000, respacing="100")
    t = timesteps(d)
    x = pictures(shape=shape, dtype=dtype) if name == "training_losses" else numbers(3, shape, dtype)

    def results(diffusion, x):
        torch.manual_seed(6)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(8)).to(x.dtype)
        more, near = ({"noise": z}, x) if name == "training_losses" else ({}, None)
        model = Model("LEARNED_RANGE", x.dtype, near=None if mean.name == "EPSILON" else near)
        drawn = torch.randn_like
        torch.randn_like = lambda like: torch.randn(like.shape).to(like.dtype)  # fp64 draws other normals
        try:
            return getattr(diffusion, name)(model, x, t, model_kwargs={"shift": 0.0}, **more)
        finally:
            torch.randn_like = drawn

    truth = results(stock, x.double())
    stock.precision = torch.float32
    plain, found = results(stock, x), results(d, x)
    for key in truth:
        assert found[key].dtype == plain[key].dtype
        wrong = tolerance.failure(f"{name} {key}", found[key], plain[key], truth[key].detach())[1]
        assert wrong is None, wrong


# -- a distribution whose best model is known ---------------------------------------------------------------------------


@pytest.mark.parametrize("mean", MEANS, ids=of)
@pytest.mark.parametrize("respacing", (None, "50"))
def test_normal_data(mean, respacing):
    """Of data N(mu, s^2) the best model is affine, and so is every step: samples can be followed by hand."""
    mu, s = 0.3, 0.4
    d, _ = pair(mean, "FIXED_SMALL", steps=200, respacing=respacing)
    a, p = d.alphas_cumprod, d.alphas_cumprod_prev
    kept = {time: i for i, time in enumerate(d.timestep_map)}

    def clean(x, i):
        """E(x_0 | x_t)"""
        return mu + a[i].sqrt() * s**2 / (a[i] * s**2 + 1 - a[i]) * (x - a[i].sqrt() * mu)

    def model(x, t):
        i = kept[int(t[0])]
        if mean.name == "START_X":
            return clean(x, i)
        if mean.name == "EPSILON":
            return (x - a[i].sqrt() * clean(x, i)) / (1 - a[i]).sqrt()
        return d.posterior_mean_coef1[i] * clean(x, i) + d.posterior_mean_coef2[i] * x

    # two samples follow mean and slope; DDIM with the best model carries N(sqrt(a) mu, a s^2 + 1 - a) along, a first order method
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    final = d.ddim_sample_loop(model, (2, 1, 1, 1), noise=ends, device="cpu", clip_denoised=False).flatten()
    slope = float((((p * a).sqrt() * s**2 + ((1 - p) * (1 - a)).sqrt()) / (a * s**2 + 1 - a)).prod())
    assert math.isclose(float(final[1] - final[0]), slope, rel_tol=1e-9)
    tolerated = 0.02 if respacing is None else 0.08
    assert abs(slope - s) < tolerated and abs(float(final[0]) - mu) < tolerated * 2
    # one ancestral step: mean and deviation of x_{t-1} by the joint distribution
    i = len(a) // 2
    x = numbers(3, (2000, 1, 1, 1)) * (a[i] * s**2 + 1 - a[i]).sqrt() + a[i].sqrt() * mu
    torch.manual_seed(0)
    before = d.p_sample(model, x, torch.full((2000,), i), clip_denoised=False)["sample"]
    assert abs(float(before.mean() - p[i].sqrt() * mu)) < 0.06 and abs(float(before.std() - (p[i] * s**2 + 1 - p[i]).sqrt())) < 0.06


def test_the_bound_of_normal_data():
    """With q's own mean and variance for the model's, every term of the bound but the first is 0."""
    d, _ = pair("PREVIOUS_X", "FIXED_SMALL", "KL")
    x, t = pictures(), torch.arange(1, B + 1)
    loss = d.training_losses(lambda x_t, t: d.q_posterior_mean_variance(x, x_t, t)[0], x, t)["loss"]
    assert float(loss.abs().max()) < 1e-12


# -- noise ------------------------------------------------------------------------------------------------------------


def test_philox():
    d, _ = pair(noise="philox")
    model, x, t = Model("LEARNED_RANGE"), numbers(3), timesteps(d)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(d.p_sample(model, x, t)["sample"])
    assert same_bits(runs[0], runs[1]) and not torch.equal(runs[0][1:], runs[2][1:])
    assert same_bits(runs[0][:1], runs[2][:1])  # at t = 0 there is none
    torch.manual_seed(3)
    terms = d.training_losses(model, pictures(), t)
    z = d.process.noised(pictures(), t, None)[1]
    assert terms["loss"].isfinite().all() and abs(float(z.mean())) < 0.2 and abs(float(z.std()) - 1) < 0.2


# -- no waiting for a device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("p_sample", "ddim_sample", "ddim_reverse_sample", "training_losses", "q_sample"))
def test_nothing_is_sent_twice_and_nothing_read_back(name):
    """On a device without values, where reading one raises; a second call copies nothing from the host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = [a for a in args if isinstance(a, torch.Tensor)]
            copied.extend(func.__name__ for a in given if isinstance(out, torch.Tensor) and a.device != out.device)
            return out

    d = mk.create_diffusion("10")
    x, t = torch.empty(SHAPE, device="meta"), torch.empty(B, dtype=torch.int64, device="meta")
    model = Model("LEARNED_RANGE", torch.float32).to("meta")
    given = (x, t) if name == "q_sample" else (model, x, t)
    for expected in (True, False):
        copied = []
        with Copies():
            getattr(d, name)(*given)
        assert bool(copied) == expected, copied


# -- what is built from what ------------------------------------------------------------------------------------------


def test_create_diffusion():
    d = mk.create_diffusion("250")
    assert d.num_timesteps == 250 and d.original_num_steps == 1000 and d.model_var_type is ours.ModelVarType.LEARNED_RANGE
    assert d.model_mean_type is ours.ModelMeanType.EPSILON and d.loss_type is ours.LossType.MSE
    for given, kinds in (
        ({"use_kl": True}, ("RESCALED_KL", "EPSILON", "LEARNED_RANGE")),
        ({"rescale_learned_sigmas": True, "predict_xstart": True}, ("RESCALED_MSE", "START_X", "LEARNED_RANGE")),
        ({"learn_sigma": False}, ("MSE", "EPSILON", "FIXED_LARGE")),
        ({"learn_sigma": False, "sigma_small": True}, ("MSE", "EPSILON", "FIXED_SMALL")),
    ):
        d = mk.create_diffusion("", **given)
        assert (d.loss_type.name, d.model_mean_type.name, d.model_var_type.name) == kinds and d.num_timesteps == 1000
    np.testing.assert_allclose(np.asarray(d.betas), np.linspace(1e-4, 0.02, 1000), rtol=1e-12)
    cosine = mk.create_diffusion(None, "squaredcos_cap_v2", diffusion_steps=100)
    assert cosine.num_timesteps == 100 and float(cosine.betas.max()) == 0.999
    signal = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(101)]
    np.testing.assert_allclose(np.asarray(cosine.alphas_cumprod[:99]), np.array(signal[1:100]) / signal[0], rtol=1e-12)


def test_spacing():
    assert ours.space_timesteps(300, "10,15,20") == ours.space_timesteps(300, [10, 15, 20])
    kept = sorted(ours.space_timesteps(300, [10, 15, 20]))
    assert len(kept) == 45 and kept[:2] == [0, 11] and kept[9:11] == [99, 100] and kept[-1] == 299
    assert ours.space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert ours.space_timesteps(10, [1, 1]) == {0, 5} and ours.space_timesteps(7, [0, 3]) == {4, 5, 6}
    d, stock = pair(respacing=[2, 3, 1], steps=30)
    names = [name for name, value in vars(stock).items() if isinstance(value, (np.ndarray, list))]
    assert len(names) == 14
    for name in names:
        np.testing.assert_allclose(np.asarray(getattr(d, name)), getattr(stock, name), rtol=1e-11, err_msg=name)


@pytest.mark.parametrize("built_there", (False, True))
def test_what_inference_mode_made_can_be_trained_with(built_there):
    """Validation in inference mode sends the tables first; training keeps them for its backward."""
    x, t = pictures(dtype=torch.float32).requires_grad_(), torch.linspace(0, 6, B).long()
    model = Model("LEARNED_RANGE", torch.float32)
    with torch.inference_mode(built_there):
        d = mk.create_diffusion("7")
    with torch.inference_mode():
        d.training_losses(model, pictures(dtype=torch.float32), t)
        d.calc_bpd_loop(model, pictures(dtype=torch.float32))
        d.p_sample(model, pictures(dtype=torch.float32), t)
    loss = d.training_losses(model, x.detach(), t)["loss"].mean()
    (loss + d.p_sample(model, x, t)["sample"].mean() + d.q_sample(x, t).mean()).backward()
    assert model.weight.grad.isfinite().all() and x.grad.isfinite().all()


def test_copies():
    d, _ = pair(respacing="5")
    x, t, model = numbers(3), timesteps(d), Model("LEARNED_RANGE")
    expected = d.ddim_sample(model, x, t)["sample"]
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert same_bits(other.ddim_sample(model, x, t)["sample"], expected)


MODEL = Model("FIXED_SMALL")
BETAS = [0.1, 0.2]
KIND = {"betas": BETAS, "model_mean_type": "epsilon", "model_var_type": "learned", "loss_type": "mse"}
REFUSED = [
    (lambda: mk.GaussianDiffusion(**KIND | {"model_mean_type": "velocity"}), "model_mean_type must be a member of ModelMeanType"),
    (lambda: mk.GaussianDiffusion(**KIND | {"loss_type": 3}), "loss_type must be a member of LossType or one of the names MSE, "),
    (lambda: mk.GaussianDiffusion(**KIND | {"betas": [0.1, 1.5]}), r"betas must be at least 2 numbers in \(0, 1\], got shape"),
    (lambda: mk.GaussianDiffusion(**KIND | {"betas": [0.1]}), r"betas must be at least 2 numbers in \(0, 1\], got shape \(1,\)"),
    (lambda: mk.GaussianDiffusion(**KIND, noise="cuda"), "noise must be one of torch, philox, got 'cuda'"),
    (lambda: mk.GaussianDiffusion(**KIND, use_timesteps=[0, 7]), "use_timesteps must be at least 2 of 0 ... 1, got"),
    (lambda: mk.create_diffusion("", "quadratic"), "name must be one of linear, cosine, squaredcos_cap_v2, got 'quadratic'"),
    (lambda: mk.create_diffusion("ddim999"), "section_counts must be a whole stride of 1000 timesteps, got 'ddim999'"),
    (lambda: mk.create_diffusion("1001"), "section_counts must take at most 1000 timesteps of section 0, got 1001"),
    (lambda: mk.create_diffusion("10").p_sample(MODEL, numbers(1), torch.zeros(B).long()), r"model must return \(5, 6, 4, 6\)"),
    (lambda: mk.create_diffusion("10").ddim_reverse_sample(MODEL, numbers(1), None, eta=0.5), "eta must be 0, the way back"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="shape must be a tuple or a list, got int"):
        mk.create_diffusion("10").p_sample_loop(MODEL, 3)
