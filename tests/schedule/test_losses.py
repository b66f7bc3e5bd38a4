"""The losses against formulas written another way, what a table holds, the weights, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.schedule.law import BF16, FP32, FP64

CPU = torch.device("cpu")
T = 50
BETAS = np.linspace(2e-3, 0.4, T)
TABLE = mk.hybrid_table(BETAS)


@pytest.fixture(params=battery.implementations("hybrid_loss", CPU))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def given(*shape, dtype=FP64, off=0.1):
    """output, x0, noise"""
    x0 = (randn(*shape, seed=1).tanh() * 127.5 + 127.5).round() / 127.5 - 1
    noise = randn(*shape, seed=2)
    output = torch.cat((noise + off * randn(*shape, seed=3), randn(*shape, seed=4)), 1)
    return [v.to(dtype) for v in (output, x0, noise)]


# -- hybrid_loss ------------------------------------------------------------------------------------------------------


def term_by_integers(x0, mean, variance, true_mean, true_variance, first):
    """One element's term of the bound, in Python's floats."""
    if not first:
        return 0.5 * (math.log(variance / true_variance) + (true_variance + (true_mean - mean) ** 2) / variance - 1)

    def cdf(x):
        u = (x - mean) / math.sqrt(variance)
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    above = 1.0 if x0 > 0.999 else cdf(x0 + 1 / 255)
    below = 0.0 if x0 < -0.999 else cdf(x0 - 1 / 255)
    return -math.log(max(above - below, 1e-12))


@pytest.mark.parametrize("clamp", [None, 0.8])
def test_the_bound_of_the_papers(implementation, clamp):
    output, x0, noise = given(3, 2, 5)
    ts = [0, 1, T - 1]
    found = mk.hybrid_loss(output, x0, noise, torch.tensor(ts), table=TABLE, vb_weight=0.5, clamp=clamp)
    abar = np.cumprod(1 - BETAS)
    for b, t in enumerate(ts):
        beta, after, before = BETAS[t], abar[t], abar[t - 1] if t else 1.0
        spreads = BETAS[1:] * (1 - abar[:-1]) / (1 - abar[1:])
        spread = spreads[max(t - 1, 0)]
        terms, squares = [], []
        for x, z, p, v in zip(*(a.flatten().tolist() for a in (x0[b], noise[b], output[b, :2], output[b, 2:])), strict=True):
            x_t = math.sqrt(after) * x + math.sqrt(1 - after) * z
            predicted = (x_t - math.sqrt(1 - after) * p) / math.sqrt(after)
            predicted = predicted if clamp is None else min(max(predicted, -clamp), clamp)
            means = [
                (math.sqrt(before) * beta * d + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - after) for d in (predicted, x)
            ]
            share = (v + 1) / 2
            terms.append(term_by_integers(x, means[0], beta**share * spread ** (1 - share), means[1], spread, t == 0))
            squares.append((z - p) ** 2)
        assert math.isclose(found.mse[b], np.mean(squares), rel_tol=1e-12)
        assert math.isclose(found.vb[b], 0.5 * np.mean(terms) / math.log(2), rel_tol=1e-9)
    assert torch.allclose(found.loss, found.mse + found.vb, rtol=1e-15)


def test_the_bound_moves_the_variance_alone_unless_it_is_the_objective(implementation):
    output, x0, noise = given(4, 2, 9)
    output.requires_grad_()
    t = torch.tensor([0, 3, 20, 49])
    for objective, moved in (("hybrid", False), ("kl", True)):
        found = mk.hybrid_loss(output, x0, noise, t, table=TABLE, objective=objective)
        (of_vb,) = torch.autograd.grad(found.vb.sum(), output, retain_graph=True)
        assert bool(of_vb[:, :2].any()) is moved and of_vb[:, 2:].all()
        (of_mse,) = torch.autograd.grad(found.mse.sum(), output, retain_graph=True)
        assert torch.allclose(of_mse[:, :2], 2 * (output[:, :2] - noise) / 18) and not of_mse[:, 2:].any()
        (of_loss,) = torch.autograd.grad(found.loss.sum(), output)
        assert torch.allclose(of_loss, of_vb if moved else of_vb + of_mse)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_what_is_far_off_is_finite(implementation, dtype):
    """Deviations of 1e30 and variances that are 0 or infinite in fp32; at t = 0 their probability is that of the clamp."""
    output, x0, noise = given(2, 2, 64, dtype=dtype)
    output[:, :2] = torch.tensor([1e30, -1e30, 1e4, 3.0], dtype=dtype).repeat(2, 2, 16)
    output[:, 2:] = torch.tensor([2e3, -2e3, 50.0, -50.0], dtype=dtype).repeat_interleave(16)
    output.requires_grad_()
    found = mk.hybrid_loss(output, x0, noise, torch.tensor([0, 0]), table=TABLE, objective="kl")
    assert found.vb.isfinite().all()
    (grad,) = torch.autograd.grad(found.vb.sum(), output)
    assert grad.isfinite().all()


def test_nan_takes_its_sample_and_of_the_gradient_its_element(implementation):
    output, x0, noise = given(3, 2, 40, dtype=FP32)
    output[0, 3, 7] = output[1, 1, 5] = math.nan
    output.requires_grad_()
    found = mk.hybrid_loss(output, x0, noise, torch.tensor([0, 5, 6]), table=TABLE)
    assert found.loss.isnan().tolist() == [True, True, False] and found.mse.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(found.loss.sum(), output)
    assert grad[0].isnan().nonzero().tolist() == [[3, 7]]
    assert grad[1].isnan().nonzero().tolist() == [[1, 5], [3, 5]]
    assert not grad[2].isnan().any()
    x0[:] = math.nan  # noise is the target, and x0 tells nothing but the level
    assert mk.hybrid_loss(output, x0, noise, torch.tensor([0, 5, 6]), table=TABLE).loss.isnan().tolist() == [True, True, False]


def test_samples_without_elements_lose_nothing(implementation):
    output, x0, noise = given(2, 3, 0, dtype=FP32)
    found = mk.hybrid_loss(output.requires_grad_(), x0, noise, torch.tensor([0, 1]), table=TABLE)
    assert all(torch.equal(v.detach(), torch.zeros(2)) for v in found)
    assert torch.autograd.grad(found.loss.sum(), output)[0].shape == (2, 6, 0)


def test_a_table_of_one_step_and_of_predictions_and_variances():
    alone = mk.hybrid_table([0.3])
    assert alone.shape == (1, 7) and alone.isfinite().all() and alone[0, 4] == math.log(0.3)
    abar = np.cumprod(1 - BETAS)
    spread = BETAS[7] * (1 - abar[6]) / (1 - abar[7])
    rows = {v: mk.hybrid_table(BETAS, variance=v)[7] for v in ("learned_range", "learned", "fixed_small", "fixed_large")}
    for variance, low, high in (
        ("learned_range", spread, BETAS[7]),
        ("learned", math.exp(-1), math.e),
        ("fixed_small", spread, spread),
        ("fixed_large", BETAS[7], BETAS[7]),
    ):
        middle, slope = rows[variance][5:].tolist()
        assert np.allclose([middle - slope, middle + slope], [math.log(low), math.log(high)], rtol=1e-14)
    assert mk.hybrid_table(BETAS, variance="fixed_large")[0, 5] == mk.hybrid_table(BETAS)[0, 4]


def test_a_schedule_that_ends_without_signal(implementation):
    """Zero terminal SNR: v and x0 say something there, and noise nothing."""
    betas = torch.tensor([0.1, 0.5, 1.0])
    output, x0, noise = given(1, 2, 9)
    for prediction in ("v", "sample", "previous"):
        table = mk.hybrid_table(betas, prediction=prediction)
        assert table.isfinite().all()
        assert mk.hybrid_loss(output, x0, noise, torch.tensor([2]), table=table).loss.isfinite().all()
    assert mk.hybrid_table(betas)[2, 2] == -math.inf


# -- diffusion_loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "huber", "smooth_l1"])
def test_torch_has_the_same_losses(implementation, kind):
    output, target = randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2)
    expected = {
        "mse": lambda: F.mse_loss(output, target),
        "huber": lambda: F.huber_loss(output, target, delta=0.4),
        "smooth_l1": lambda: F.smooth_l1_loss(output, target, beta=0.4),
    }[kind]()
    assert torch.allclose(mk.diffusion_loss(output, target, kind=kind, delta=0.4), expected, rtol=1e-14)


def test_pseudo_huber_neither_cancels_nor_overflows(implementation):
    output = torch.tensor([[1e-6], [1e30], [0.0]], requires_grad=True)
    found = mk.diffusion_loss(output, torch.zeros(3, 1), kind="pseudo_huber", delta=1.0, reduction="none")
    assert torch.allclose(found, torch.tensor([5e-13, 1e30, 0.0]))
    assert torch.allclose(torch.autograd.grad(found.sum(), output)[0], torch.tensor([[1e-6], [1.0], [0.0]]))


def test_a_weight_has_a_gradient_and_any_number_of_ones_behind(implementation):
    output, target = randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2)
    weight = torch.tensor([0.5, 2.0, 0.0]).requires_grad_()
    of_samples = (output - target).square().mean((1, 2))
    found = mk.diffusion_loss(output, target, weight=weight.reshape(3, 1, 1))
    assert torch.allclose(found, (of_samples * weight).mean())
    assert torch.allclose(torch.autograd.grad(found, weight)[0].double(), of_samples / 3)


def test_what_is_masked_is_not_looked_at(implementation):
    output, target = randn(2, 3, 4, seed=1).requires_grad_(), randn(2, 3, 4, seed=2)
    target[0, :, 1], mask = math.nan, torch.ones(2, 1, 4, dtype=torch.bool)
    mask[0, :, 1] = False
    found = mk.diffusion_loss(output, target, mask=mask, reduction="none")
    expected = (output - target)[0][:, [0, 2, 3]].square().mean()
    assert torch.allclose(found[0], expected)
    (grad,) = torch.autograd.grad(found.sum(), output)
    assert not grad[0, :, 1].any() and grad.isfinite().all() and grad[1].all()


def test_of_nothing(implementation):
    assert torch.equal(mk.diffusion_loss(torch.zeros(2, 0), torch.zeros(2, 0), reduction="none"), torch.zeros(2))
    assert mk.diffusion_loss(torch.zeros(0, 3), torch.zeros(0, 3)).isnan()
    assert mk.diffusion_loss(torch.zeros(0, 3), torch.zeros(0, 3), reduction="none").shape == (0,)


def test_16_bits_give_fp32(implementation):
    output, target = randn(2, 3000, seed=1).to(BF16), randn(2, 3000, seed=2).to(BF16)
    found = mk.diffusion_loss(output, target)
    assert found.dtype == FP32
    assert torch.allclose(found.double(), (output.double() - target.double()).square().mean(), rtol=1e-7)


# -- loss_weight ------------------------------------------------------------------------------------------------------

ALPHAS = torch.linspace(1.0, 0.0, 11, dtype=FP64)  # an infinite SNR, and none


def test_min_snr():
    t = torch.arange(11)
    snr = ALPHAS / (1 - ALPHAS)
    for prediction, expected in (
        ("epsilon", snr.clamp(max=5) / snr),
        ("v", snr.clamp(max=5) / (snr + 1)),
        ("sample", snr.clamp(max=5)),
    ):
        found = mk.loss_weight(t, prediction=prediction, table=ALPHAS)
        assert found.dtype == FP32 and found.isfinite().all()
        assert torch.allclose(found[1:-1].double(), expected[1:-1], rtol=1e-6)
    assert mk.loss_weight(t, table=ALPHAS)[[0, -1]].tolist() == [0.0, 1.0]
    assert mk.loss_weight(t, prediction="v", table=ALPHAS)[[0, -1]].tolist() == [0.0, 0.0]
    assert torch.equal(mk.loss_weight(torch.tensor([-3, 2**40]), table=ALPHAS), mk.loss_weight(torch.tensor([0, 10]), table=ALPHAS))
    times = torch.tensor([0.2, 0.9], dtype=FP64)
    snr = ((1 - times) / times).square()
    assert torch.allclose(mk.loss_weight(times, path="linear", gamma=2.0).double(), snr.clamp(max=2) / snr, rtol=1e-6)


def test_weights_of_noise_levels():
    s = torch.tensor([0.1, 0.5, 0.8], dtype=FP64)
    density = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(0.3, 0.7), [torch.distributions.SigmoidTransform()], validate_args=False
    )
    for kind, expected in (
        ("sigma_sqrt", 1 / s**2),
        ("cosmap", 2 / (math.pi * (1 - 2 * s + 2 * s**2))),
        ("logit_normal", density.log_prob(s).exp()),
        ("edm", 1 / 0.4**2 + 1 / s**2),
    ):
        found = mk.loss_weight(s, kind=kind, sigma_data=0.4, mean=0.3, std=0.7)
        assert torch.allclose(found.double(), expected, rtol=1e-6)
    ends = torch.tensor([0.0, 1.0, math.nan])
    assert mk.loss_weight(ends, kind="logit_normal").tolist()[:2] == [0.0, 0.0]
    assert all(mk.loss_weight(ends, kind=kind)[2].isnan() for kind in ("sigma_sqrt", "cosmap", "logit_normal", "edm"))


# -- bad input --------------------------------------------------------------------------------------------------------

OUTPUT, X0, NOISE = given(2, 3, 8, dtype=FP32)


def hybrid(output=OUTPUT, x0=X0, noise=NOISE, t=torch.tensor([0, 1]), table=TABLE, **named):  # noqa: B008
    return mk.hybrid_loss(output, x0, noise, t, table=table, **named)


def loss(output=X0, target=NOISE, **named):
    return mk.diffusion_loss(output, target, **named)


REFUSED = [
    (lambda: hybrid(output=3), TypeError, "output must be a tensor, got int"),
    (lambda: hybrid(output=OUTPUT[:, :5]), ValueError, r"output must be \(2, 6, 8\), a prediction and a variance, or \(2, 3, 8\)"),
    (lambda: hybrid(x0=X0[0]), ValueError, "noise must have x0's shape"),
    (lambda: hybrid(x0=X0[:, 0, 0]), ValueError, r"x0 must be \(B, C, ...\), got shape \(2,\)"),
    (lambda: hybrid(x0=X0.clone().requires_grad_()), ValueError, "x0 has no derivative here: detach it"),
    (lambda: hybrid(noise=NOISE.clone().requires_grad_()), ValueError, "noise has no derivative here: detach it"),
    (lambda: hybrid(t=torch.tensor([0.1, 0.2])), TypeError, "t must be int32 or int64, got torch.float32"),
    (lambda: hybrid(t=torch.tensor([0])), ValueError, r"t must be one timestep per sample \(2,\), got shape \(1,\)"),
    (lambda: hybrid(table=TABLE.float()), TypeError, "table must be a float64 tensor, got torch.float32"),
    (lambda: hybrid(table=TABLE[:, :6]), ValueError, r"table must be \(T, 7\) with T >= 1, as hybrid_table makes it, got shape"),
    (lambda: hybrid(objective="mse"), ValueError, "objective must be one of hybrid, kl, got 'mse'"),
    (lambda: hybrid(vb_weight=math.inf), ValueError, "vb_weight must be finite, got inf"),
    (lambda: hybrid(clamp=0.0), ValueError, "clamp must be above 0, got 0.0"),
    (lambda: mk.hybrid_table([[0.1]]), ValueError, r"betas must be \(T,\) with T >= 1, got shape \(1, 1\)"),
    (lambda: mk.hybrid_table([0.1, 1.5]), ValueError, "betas must be in"),
    (lambda: mk.hybrid_table([0.1], prediction="flow"), ValueError, "prediction must be one of epsilon, sample, v, previous"),
    (lambda: mk.hybrid_table([0.1], variance="range"), ValueError, "variance must be one of learned_range, learned, fixed_small"),
    (lambda: loss(output=X0.sum()), ValueError, r"output must be \(B, ...\), got a scalar"),
    (lambda: loss(target=NOISE[:1]), ValueError, r"target must have output's shape \(2, 3, 8\), got \(1, 3, 8\)"),
    (lambda: loss(kind="l3"), ValueError, "kind must be one of mse, huber, smooth_l1, pseudo_huber, got 'l3'"),
    (lambda: loss(reduction="sum"), ValueError, "reduction must be one of mean, none, got 'sum'"),
    (lambda: loss(delta=-1.0), ValueError, "delta must be above 0, got -1.0"),
    (lambda: loss(delta="1"), TypeError, "delta must be a number, got str"),
    (lambda: loss(delta=torch.ones(3)), ValueError, r"delta must be \(2,\) or \(2, 1, ...\), a number per sample, got"),
    (lambda: loss(delta=torch.ones(2, requires_grad=True)), ValueError, "delta has no derivative here: detach it"),
    (lambda: loss(weight=torch.ones(2, 3)), ValueError, r"weight must be \(2,\) or \(2, 1, ...\), a number per sample, got shape"),
    (lambda: loss(weight=torch.ones(2).long()), TypeError, "weight must be float64, float32, bfloat16 or float16"),
    (lambda: loss(mask=torch.ones(2, 3, 8)), TypeError, "mask must be a bool tensor, got torch.float32"),
    (lambda: loss(mask=torch.ones(2, 8, dtype=torch.bool)), ValueError, "mask must have output's dimensions, each of"),
    (lambda: mk.loss_weight(torch.ones(2), kind="p3"), ValueError, "kind must be one of min_snr, sigma_sqrt, cosmap"),
    (lambda: mk.loss_weight(torch.ones(2), table=ALPHAS), TypeError, "t must be int32 or int64, got torch.float32"),
    (lambda: mk.loss_weight(torch.ones(2).long()), TypeError, "t must be float64"),
    (lambda: mk.loss_weight(torch.ones(2).long(), kind="edm", table=ALPHAS), ValueError, "table is of min_snr"),
    (lambda: mk.loss_weight(torch.ones(2).long(), table=ALPHAS.view(1, -1)), ValueError, r"table must be \(S,\) with S >= 1"),
    (lambda: mk.loss_weight(torch.ones(2), gamma=0), ValueError, "gamma must be above 0, got 0"),
    (lambda: mk.loss_weight(torch.ones(2), prediction="flow"), ValueError, "prediction must be one of epsilon, sample, v"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m[:50] for _, _, m in REFUSED])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
