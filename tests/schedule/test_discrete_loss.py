"""vq_diffusion_loss against chains multiplied out, finite differences and the distributions that are drawn from; its contract."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.battery.schedule.discrete import DIFFUSIONS, KEPT, posterior
from mmgen_kernels.battery.schedule.discrete_loss import posteriors

CPU = torch.device("cpu")
K = 5
STEPS = len(KEPT)


@pytest.fixture(params=battery.implementations("vq_diffusion_loss", CPU))
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def table(name, num_codes=K):
    return mk.transition_table(KEPT, num_codes, gammas_cumprod=None if name == "absorbing" else DIFFUSIONS[name])


def seen(name, shape):
    """x0 and x_t that can come of it."""
    x0, x_t = randint(0, K, shape, 1), randint(0, K + (name != "uniform"), shape, 2)
    return x0, torch.where(x_t < K, x0, K) if name == "absorbing" else x_t


@pytest.mark.parametrize("name", ["uniform", "mask_and_replace"])
def test_the_bound_of_a_chain_is_the_sum_over_its_paths(implementation, name):
    """-log p of the chain is at most the bound, and the bound is the sum over all paths of q log q(path) / p(path)."""
    codes, rows = 3, table(name, 3)[:3]
    said = 1.5 * randn(3, codes + 1, codes, seed=3)  # of each step and x_t
    of_step = [posteriors(row, codes) for row in rows]  # [x_t, k, x_{t-1}]
    backwards = [torch.einsum("xk,xkm->xm", said[t].softmax(-1), of_step[t]) for t in range(3)]
    ever = torch.full((codes + 1, codes + 1), float(rows[2, 4]), dtype=torch.float64)  # q(x_T | x0)
    ever[range(codes), range(codes)] += rows[2, 3]
    ever[:, codes] = rows[2, 5]

    for x0 in range(codes):
        paths = 0.0
        for x3, x2, x1 in itertools.product(range(codes + 1), repeat=3):
            q = ever[x0, x3] * of_step[2][x3, x0, x2] * of_step[1][x2, x0, x1]
            p = backwards[2][x3, x2] * backwards[1][x2, x1] * backwards[0][x1, x0]
            if q > 0:
                paths += q * ((of_step[2][x3, x0, x2] * of_step[1][x2, x0, x1]) / p).log()
        bound = 0.0
        reached = ever[x0]  # q(x_t | x0), from the last step on
        for t in (2, 1, 0):
            x_t = torch.arange(codes + 1)[None]
            found = mk.vq_diffusion_loss(said[t][None], torch.full_like(x_t, x0), x_t, rows, t, reduction="places").loss[0]
            bound += (reached * torch.where(reached > 0, found, 0)).sum()
            reached = torch.einsum("x,xm->m", reached, of_step[t][:, x0])
        assert math.isclose(bound, paths, rel_tol=1e-12)


@pytest.mark.parametrize("name", DIFFUSIONS)
@pytest.mark.parametrize("step", range(STEPS))
def test_it_is_the_divergence_from_what_is_drawn(implementation, name, step):
    """By the weights that vq_diffusion_step draws by, of a model's p and of the truth's."""
    x0, x_t = seen(name, (1, 60))
    logits, row = 2 * randn(1, 60, K, seed=4), table(name)[step]
    p, q = (posterior(of, x_t[0], row) for of in (logits[0].softmax(-1), F.one_hot(x0[0], K).double()))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)
    if step == 0:  # q is certain: its logarithm is that of p
        stays = (x_t < K) & (row[1] == 0)
        expected = torch.where(stays, 0, F.cross_entropy(logits.mT, x0, reduction="none"))[0]
    found = mk.vq_diffusion_loss(logits, x0, x_t, table(name), step, reduction="places").loss[0]
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_gradcheck(implementation, name):
    logits, weight = (2 * randn(STEPS, 7, K, seed=5)).requires_grad_(), torch.rand(STEPS, dtype=torch.float64)
    x0, x_t = seen(name, (STEPS, 7))
    steps, mask = torch.arange(STEPS), torch.rand(STEPS, 7) < 0.8
    for options in ({}, {"reduction": "places", "weight": weight, "mask": mask}, {"reduction": "none", "aux_weight": weight}):

        def losses(logits, options=options):
            found = mk.vq_diffusion_loss(logits, x0, x_t, table(name), steps, **options)
            return tuple(each for each in found if each is not None)

        torch.autograd.gradcheck(losses, (logits,))
        turned = logits.detach().mT.contiguous().requires_grad_()
        first = {"dim": 1} | options
        torch.autograd.gradcheck(lambda t, o=first: mk.vq_diffusion_loss(t, x0, x_t, table(name), steps, **o).loss, (turned,))


def test_what_a_nearly_perfect_model_loses_is_not_lost_in_rounding(implementation):
    """Differences of nearly equal logarithms of fp32 would leave 1e-7 here."""
    x0, x_t = seen("mask_and_replace", (4, 200))
    logits = torch.where(F.one_hot(x0, K) == 1, 12.0, 0.0)  # 1 - p is 2.5e-5
    rows, steps = table("mask_and_replace"), torch.tensor([1, 2, 3, 4])
    found, exact = (mk.vq_diffusion_loss(z, x0, x_t, rows, steps, reduction="places").loss for z in (logits, logits.double()))
    assert ((found - exact).abs() < 1e-6 * exact + 1e-11).all() and exact.max() < 1e-4


def test_weights_masks_and_terms_add_up(implementation):
    x0, x_t = seen("mask_and_replace", (4, 9))
    logits, rows = randn(4, 9, K, seed=6), table("mask_and_replace")
    steps, mask = torch.tensor([0, 1, 3, 5]), torch.rand(4, 9) < 0.5
    mask[2] = False
    weight, aux = torch.rand(4).double(), torch.rand(4).double()
    alone = mk.vq_diffusion_loss(logits, x0, x_t, rows, steps, reduction="places")
    missed = F.cross_entropy(logits.mT, x0, reduction="none")
    assert alone.aux is None and torch.allclose(alone.vb, alone.loss.mean(1))
    each = weight[:, None] * (alone.loss + aux[:, None] * missed) * mask
    count = mask.sum(1).clamp(min=1)
    for reduction, expected in (("places", each), ("none", each.sum(1) / count), ("mean", (each.sum(1) / count).mean())):
        found = mk.vq_diffusion_loss(
            logits, x0, x_t, rows, steps, weight=weight[:, None], aux_weight=aux, mask=mask, reduction=reduction
        )
        assert torch.allclose(found.loss, expected)
        assert torch.allclose(found.vb, (alone.loss * mask).sum(1) / count)
        assert torch.allclose(found.aux, (missed * mask).sum(1) / count)
    doubled = mk.vq_diffusion_loss(logits, x0, x_t, rows, steps, aux_weight=2.0, reduction="none")
    assert torch.allclose(doubled.loss, doubled.vb + 2 * doubled.aux)


def test_layouts_tables_and_steps_say_the_same(implementation):
    x0, x_t = seen("mask_and_replace", (3, 40))
    logits, rows = randn(3, 40, K, seed=7).float(), table("mask_and_replace")
    for step in (0, 3):
        of_host = mk.vq_diffusion_loss(logits, x0, x_t, rows, step, reduction="places").loss
        for at in (torch.tensor(step), torch.full((3,), step)):
            assert torch.equal(mk.vq_diffusion_loss(logits, x0, x_t, rows, at, reduction="places").loss, of_host)
        turned = logits.mT.contiguous()
        assert torch.equal(mk.vq_diffusion_loss(turned, x0, x_t, rows, step, dim=1, reduction="places").loss, of_host)


def test_nan_takes_its_place_and_what_is_settled_is_not_looked_at(implementation):
    logits = randn(2, 6, K, seed=8).float()
    logits[0, 1, 2], logits[0, 2, 3], logits[0, 3] = math.nan, math.inf, -math.inf
    logits.requires_grad_()
    x0 = randint(0, K, (2, 6), 1)
    x_t = torch.full((2, 6), K)
    bad = torch.tensor([False, True, True, True, False, False])
    rows = table("absorbing")
    for name in ("absorbing", "mask_and_replace"):
        found = mk.vq_diffusion_loss(logits, x0, x_t, table(name), 2, reduction="places")
        assert torch.equal(found.loss[0].isnan(), bad) and not found.loss[1].isnan().any()
        assert found.vb.isnan().tolist() == [True, False]
        (slope,) = torch.autograd.grad(found.loss.sum(), logits)
        assert torch.equal(slope.isnan()[0].any(-1), bad) and torch.equal(slope.isnan()[0].all(-1), bad)
    masked = mk.vq_diffusion_loss(logits, x0, x_t, rows, 2, mask=~bad.expand(2, 6))
    assert masked.loss.isfinite() and not torch.autograd.grad(masked.loss, logits)[0].isnan().any()
    settled = mk.vq_diffusion_loss(logits, x0, x0, rows, 2)
    assert settled.loss == 0 and not torch.autograd.grad(settled.loss, logits)[0].any()
    assert mk.vq_diffusion_loss(logits, x0, x0, rows, 2, aux_weight=0.1).aux.isnan().tolist() == [True, False]


def test_what_has_no_probability(implementation):
    logits = torch.zeros(1, 1, K).index_fill(2, torch.tensor([1]), -math.inf).requires_grad_()
    x0, hidden = torch.tensor([[1]]), torch.tensor([[K]])
    for name, step, finite in (("absorbing", 2, False), ("mask_and_replace", 2, True), ("mask_and_replace", 0, False)):
        found = mk.vq_diffusion_loss(logits, x0, hidden, table(name), step)
        (slope,) = torch.autograd.grad(found.loss, logits)
        assert found.loss.isfinite() == finite and found.loss > 0 and slope.isfinite().all()
    far = torch.zeros(1, 1, K)
    far[0, 0, 1] = -300.0  # whose probability is 0 in fp32
    found = mk.vq_diffusion_loss(far, x0, hidden, table("absorbing"), 0).loss
    assert math.isclose(found.item(), 300 + math.log(K - 1), rel_tol=1e-6)


def test_a_state_that_cannot_be_costs_nothing(implementation):
    """Of a table that ends fully masked: a code that is seen there comes of nothing."""
    hidden = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    rows = mk.transition_table((1 - hidden) * 0.9, K, gammas_cumprod=hidden)
    x_t = torch.tensor([[0, 1, K]])
    found = mk.vq_diffusion_loss(randn(1, 3, K, seed=9), torch.zeros_like(x_t), x_t, rows, 2, reduction="places").loss
    assert torch.equal(found, torch.zeros(1, 3, dtype=torch.float64))


def test_of_nothing(implementation):
    rows = table("absorbing")
    nobody = torch.zeros(0, 3, dtype=torch.int64)
    assert mk.vq_diffusion_loss(torch.zeros(0, 3, K), nobody, nobody, rows, 1).loss.isnan()
    nowhere = torch.zeros(2, 0, dtype=torch.int64)
    assert mk.vq_diffusion_loss(torch.zeros(2, 0, K), nowhere, nowhere, rows, 1).loss == 0


def test_nothing_of_the_logits_size_is_kept():
    logits = randn(2, 7, 64, seed=1).float().requires_grad_()
    x = randint(0, 65, (2, 7), 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = mk.vq_diffusion_loss(logits, x, x, table("mask_and_replace", 64), 2).loss
    assert [t.shape for t in kept if t.numel() > 100] == [logits.shape] and loss.requires_grad


# -- bad input --------------------------------------------------------------------------------------------------------

L, X = torch.zeros(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)
ROWS = table("absorbing", 9)


def loss(logits=L, x0=X, x_t=X, rows=ROWS, at=0, **named):
    return mk.vq_diffusion_loss(logits, x0, x_t, rows, at, **named)


REFUSED = [
    (lambda: loss(logits=L.long()), TypeError, "logits must be float64, float32, bfloat16 or float16, got torch.int64"),
    (lambda: loss(logits=L[0]), ValueError, r"logits must be \(B, N, K\) with K >= 1, got shape \(3, 9\)"),
    (lambda: loss(dim=2), ValueError, "dim must be -1 or 1, got 2"),
    (lambda: loss(x0=X.int()), TypeError, "x0 must be int64, got torch.int32"),
    (lambda: loss(x0=X[:1]), ValueError, r"x0 must be of shape \(2, 3\), classes last, got \(1, 3\)"),
    (lambda: loss(x_t=None), TypeError, "x_t must be int64, got NoneType"),
    (lambda: loss(rows=ROWS.float()), TypeError, "transitions must be a float64 tensor, got torch.float32"),
    (lambda: loss(rows=ROWS[:, :8]), ValueError, r"transitions must be \(steps, 9\) with a step at least, got shape \(6, 8\)"),
    (lambda: loss(at=6), ValueError, r"step must be in \[0, 6\), got 6"),
    (lambda: loss(at=torch.zeros(3).long()), ValueError, "step must be a scalar or one index per sample"),
    (lambda: loss(reduction="sum"), ValueError, "reduction must be one of mean, none, places, got 'sum'"),
    (lambda: loss(weight=torch.ones(3)), ValueError, r"weight must be \(2,\) or \(2, 1, ...\), a number per sample, got shape"),
    (lambda: loss(weight=torch.ones(2, requires_grad=True)), ValueError, "weight has no derivative here: detach it, or multiply"),
    (lambda: loss(aux_weight="1"), TypeError, "aux_weight must be a number, got str"),
    (lambda: loss(aux_weight=math.inf), ValueError, "aux_weight must be finite, got inf"),
    (lambda: loss(aux_weight=torch.ones(2).long()), TypeError, "aux_weight must be float64, float32, bfloat16 or float16"),
    (lambda: loss(mask=torch.ones(2, 3)), TypeError, "mask must be a bool tensor, got torch.float32"),
    (lambda: loss(mask=torch.ones(2, 1, dtype=torch.bool)), ValueError, r"mask must be of shape \(2, 3\), a bool per place, got"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m[:50] for _, _, m in REFUSED])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
