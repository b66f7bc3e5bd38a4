"""The steps of discrete diffusion: what they draw, against the exact distributions and against diffusers; what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.battery.schedule.discrete import DIFFUSIONS, KEPT, posterior

CPU = torch.device("cpu")
DRAWS = 1_000_000
KEY = torch.tensor([5, 2**33])
GIVEN = [i for i in battery.implementations("vq_diffusion_step", CPU) if i != "triton"]  # by the interpreter they take minutes


@pytest.fixture(params=GIVEN)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


@pytest.fixture
def preferred():
    """A million draws of the reference take seconds; the battery compares all with the exact race."""
    with mk.use_backend(GIVEN[0]):
        yield GIVEN[0]


def table(name, num_codes):
    return mk.transition_table(KEPT, num_codes, gammas_cumprod=None if name == "absorbing" else DIFFUSIONS[name])


def assert_frequencies(drawn, p):
    """Each class as often as it should be, within four standard deviations; one of no probability never."""
    counts = torch.bincount(drawn, minlength=len(p)).double()
    n = counts.sum()
    assert (counts[p == 0] == 0).all()
    off = (counts - n * p).abs() / (n * p * (1 - p)).sqrt().clamp(min=1)
    assert (off <= 4).all(), f"{float(off.max()):.1f} standard deviations"


@pytest.mark.parametrize("codes_first", [False, True])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_frequencies_are_those_of_the_posterior(preferred, diffusion, codes_first):
    K, logits, rows = 11, 2 * randn(11, seed=3), table(diffusion, 11)
    logits[4] = -torch.inf
    seen = [3, *([K] if diffusion != "uniform" else [])]
    for x, step in [(x, step) for x in seen for step in (0, 2)]:
        x_t = torch.full((1, DRAWS), x)
        spread = logits.float().expand(1, DRAWS, K)
        spread = spread.mT if codes_first else spread
        drawn = mk.vq_diffusion_step(spread, x_t, rows, step, noise=KEY, dim=1 if codes_first else -1)
        p = posterior(torch.softmax(logits, 0)[None], x_t[0, :1], rows[step])[0]
        assert_frequencies(drawn[0], p / p.sum())


def test_frequencies_of_unmasking_are_those_of_softmax(preferred):
    logits = 2 * randn(13, seed=4)
    spread, masked = logits.float().expand(1, DRAWS, 13), torch.full((1, DRAWS), -1)
    for heat in (1.0, 0.6):
        drawn = mk.unmask_step(spread, masked, mk.masking_table(1), 0, mask_id=-1, noise=KEY, temperature=heat)
        assert_frequencies(drawn.pred_original_sample[0], torch.softmax(logits / heat, 0))
        assert torch.equal(*drawn)  # the last step masks nothing


def test_confidences_hold_a_gumbel_of_their_own(implementation):
    """Two positions of confidences l and m: at heat 1 the first waits as often as exp(m) to exp(l)."""
    logits = torch.tensor([[30.0, 30.0 - math.log(3)], [0.0, 0.0]]).repeat(2000, 1, 1)  # p = 3/4, 1/4 and 1/2, 1/2
    masked = torch.full((2000, 2), -1)
    rows = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    given = mk.unmask_step(logits, masked, rows, 0, mask_id=-1, noise=KEY, temperature=0.0)
    assert ((given.prev_sample == -1).sum(1) == 1).all()
    first_waits = (given.prev_sample[:, 0] == -1).double().mean()
    assert abs(first_waits - 0.5 / 1.25) < 4 * math.sqrt(0.4 * 0.6 / 2000)


def test_of_equal_ones_the_first(implementation):
    logits, masked, ones = torch.zeros(2, 100, 70), torch.full((2, 100), -1), torch.ones(2, 100)
    rows = torch.tensor([[0.25, 0.0]], dtype=torch.float64)
    given = mk.unmask_step(logits, masked, rows, 0, mask_id=-1, noise=(torch.ones(2, 100, 70), ones))
    assert (given.pred_original_sample == 0).all()
    assert (given.prev_sample[:, :25] == -1).all() and (given.prev_sample[:, 25:] == 0).all()
    even = table("mask_and_replace", 70)
    even[0] = torch.tensor([0, 0.01, 0.3, 0, 0.01, 0.3, 0, 0.01, 0.3])
    drawn = mk.vq_diffusion_step(logits, torch.full((2, 100), 70), even, 0, noise=torch.ones(2, 100, 71))
    assert (drawn == 70).all()  # the mask is likelier by far
    even[0, 8] = 0
    assert (mk.vq_diffusion_step(logits, torch.full((2, 100), 70), even, 0, noise=torch.ones(2, 100, 71)) == 0).all()


def test_a_whole_run_ends_without_a_mask(implementation):
    K, x = 19, torch.full((2, 64), 19)
    rows = table("absorbing", K)
    for step in reversed(range(len(rows))):
        before, x = x, mk.vq_diffusion_step(randn(2, 64, K, seed=step).float(), x, rows, step, noise=KEY)
        assert torch.equal(x[before < K], before[before < K])
    assert (x < K).all()
    sample, rows, waiting = torch.full((2, 64), -1), mk.masking_table(8), [64]
    for step in range(8):
        sample = mk.unmask_step(randn(2, 64, K, seed=step).float(), sample, rows, step, mask_id=-1, noise=KEY).prev_sample
        waiting.append(int((sample[0] == -1).sum()))
    assert waiting == sorted(waiting, reverse=True) and len(set(waiting)) == 9 and waiting[-1] == 0


def test_tables():
    rows = table("mask_and_replace", 7).view(-1, 3, 3)
    num_codes = torch.tensor([1.0, 7.0, 1.0], dtype=torch.float64)
    assert ((rows * num_codes).sum(-1) - 1).abs().max() < 1e-12
    assert torch.equal(rows[1:, 2], rows[:-1, 1]) and rows[0, 2].tolist() == [1, 0, 0]
    assert (table("absorbing", 7).view(-1, 3, 3)[..., 1] == 0).all() and (table("uniform", 7).view(-1, 3, 3)[..., 2] == 0).all()
    for kind in ("cosine", "linear"):
        ratios = mk.masking_table(10, kind=kind, starting_mask_ratio=0.5)[:, 0]
        assert ratios[-1] == 0 and (ratios.diff() < 0).all() and ratios[0] < 0.5
    assert mk.masking_table(3, temperature=1.0)[:, 1].tolist() == pytest.approx([1.0, 0.505, 0.01])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_what_differs_from_absorbing_by_a_rounding_is_absorbing(implementation, dtype):
    """1 - (a + (1 - a)) is not 0: codes that could have become others by that, but none by all steps, would all become others."""
    for kept in (torch.linspace(0.99, 0.01, 50, dtype=dtype), torch.exp(-torch.linspace(0.01, 8, 50, dtype=dtype))):
        rows = mk.transition_table(kept, 16, gammas_cumprod=1 - kept)
        assert (rows[:, [1, 4, 7]] == 0).all()
        for step in range(50):
            codes = randint(0, 16, (1, 64), step)
            assert torch.equal(mk.vq_diffusion_step(randn(1, 64, 16, seed=step), codes, rows, step, noise=KEY), codes)


@pytest.mark.parametrize("size", (1e-10, 1e-17, 1e-25))
def test_codes_that_hardly_become_others_have_their_probability(implementation, size):
    """1 - A / (A + B) is 0 in fp64 from B = 1e-17 on: what is not said that way is not lost."""
    p = torch.softmax(torch.tensor([0.0, 3.0, -3.0], dtype=torch.float64), 0)
    row = torch.tensor([1 - 3 * size, size, 0, 0.9, size, 0.1, 0.95, size / 2, 0.05], dtype=torch.float64)
    own = (1 - 2 * size) * (0.95 * size / 0.9 * p[1] + size / 2 * (1 - p[1]))
    others = size * (0.95 * (1 - p[1]) + size * (1 - p[1]))
    where = torch.ones(1, 1, dtype=torch.int64)
    drawn = mk.vq_diffusion_step(p.log()[None, None], where, row[None], 0, noise=torch.ones(1, 1, 4), return_log_prob=True)
    assert drawn[0].item() == 1 and drawn[1].item() == pytest.approx(math.log(own / (own + others)), rel=1e-6)


def test_where_no_number_is_one_the_first_class_is_drawn(implementation):
    """Never one that there is not, as of the padding of a row."""
    nan = torch.full((2, 3, 6), torch.nan)
    rows, logits = table("mask_and_replace", 5), randn(2, 3, 5, seed=1)
    assert (mk.vq_diffusion_step(logits, torch.full((2, 3), 5), rows, 2, noise=nan) == 0).all()
    drawn = mk.unmask_step(logits, torch.full((2, 3), 9), mk.masking_table(1), 0, mask_id=9, noise=(nan[..., :5], nan[..., 5]))
    assert (drawn.prev_sample == 0).all()


def test_the_likeliest_is_that_of_the_logits(implementation):
    """Also where the logarithm of its probability is that of others to a rounding."""
    logits, masked = 1e-9 * randn(50, 1, 4096, seed=2).float(), torch.full((50, 1), -1)
    drawn = mk.unmask_step(logits, masked, mk.masking_table(1), 0, mask_id=-1, noise=KEY, temperature=0)
    assert torch.equal(drawn.prev_sample, logits.argmax(-1))


@pytest.mark.parametrize(("ratio", "waiting"), ((math.inf, 5), (1e30, 5), (2.0, 5), (-1.0, 0), (math.nan, 0)))
def test_ratios_beyond_1_mask_all_but_one(implementation, ratio, waiting):
    rows = torch.tensor([[ratio, 0.0]], dtype=torch.float64)
    given = mk.unmask_step(randn(2, 6, 5, seed=1), torch.full((2, 6), 5), rows, 0, mask_id=5, noise=KEY)
    assert ((given.prev_sample == 5).sum(1) == waiting).all()


# -- diffusers --------------------------------------------------------------------------------------------------------


def stock_in_fp64(monkeypatch, K):
    """diffusers' scheduler with its levels, made in fp64 and rounded to fp32, in fp64; and those levels as a table."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_vq_diffusion as module

    def log_onehot(x, num_classes):  # stock's is fp32
        return F.one_hot(x, num_classes).permute(0, 2, 1).double().clamp(min=1e-30).log()

    monkeypatch.setattr(module, "index_to_log_onehot", log_onehot)
    scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=K + 1)
    names = ("log_at", "log_bt", "log_ct", "log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct")
    for name in names:
        setattr(scheduler, name, getattr(scheduler, name).double())
    one, all_ = (torch.stack([getattr(scheduler, n).exp() for n in names[i : i + 3]], 1) for i in (0, 3))
    before = torch.cat((all_[-1:], all_[:-2]))
    return scheduler, torch.cat((one, all_[:-1], before), 1)


@pytest.mark.parametrize("t", [0, 1, 50, 99])
def test_draws_are_diffusers_own_given_its_noise(implementation, monkeypatch, t):
    B, K, N = 3, 37, 200
    scheduler, rows = stock_in_fp64(monkeypatch, K)
    log_p = torch.log_softmax(3 * randn(B, K, N, seed=t), 1)
    log_p[:, 5] = -torch.inf  # as truncation leaves it
    x_t = randint(0, K + 1, (B, N), t)
    x_t[:, ::3] = K
    weights = log_p if t == 0 else scheduler.q_posterior(log_p, x_t, t)
    uniform = torch.rand(weights.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    e = 1e-30 - (uniform + 1e-30).log()
    expected = (weights - e.log()).argmax(1)
    given = torch.cat((e, torch.ones_like(e[:, :1])), 1) if t == 0 else e
    drawn, log_prob = mk.vq_diffusion_step(log_p, x_t, rows, t, noise=given, dim=1, return_log_prob=True)
    assert torch.equal(drawn, expected)
    exact = torch.log_softmax(weights, 1).gather(1, expected[:, None])[:, 0]
    # at t = 0 stock takes p as it is; by the levels, rounded to fp32, q(x_0 | x_0) is 1 to that rounding
    assert (log_prob - exact).abs().max() < (1e-6 if t == 0 else 1e-10)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_unmasking_is_amuseds_given_its_noise(implementation, kind):
    diffusers = pytest.importorskip("diffusers")
    B, N, K, steps = 2, 61, 23, 12
    scheduler = diffusers.AmusedScheduler(mask_token_id=K, masking_schedule=kind)
    scheduler.set_timesteps(steps, temperature=(2, 0))
    rows, sample = mk.masking_table(steps, kind=kind), torch.full((B, N), K)
    for i, t in enumerate(scheduler.timesteps):
        logits = 3 * randn(B, N, K, seed=i).float()
        expected = scheduler.step(logits, t, sample, generator=torch.Generator().manual_seed(i))
        generator = torch.Generator().manual_seed(i)
        codes = torch.empty(B, N, K).exponential_(generator=generator)  # what torch.multinomial draws
        uniform = torch.empty(B, N).uniform_(generator=generator)
        given = mk.unmask_step(logits, sample, rows, i, mask_id=K, noise=(codes, -uniform.clamp(1e-20).log()))
        assert torch.equal(given.pred_original_sample, expected.pred_original_sample)
        assert torch.equal(given.prev_sample, expected.prev_sample)
        sample = given.prev_sample
    assert (sample < K).all()
