"""The process against a brute force that knows nothing of it but how codes are hidden: all states, all steps, Bayes' rule."""

import functools
import itertools
import math

import pytest
import torch

import mmgen_kernels as mk
from mmgen.diffusion.codes import Absorbing, AbsorbingConfig
from mmgen.diffusion.mask_and_replace import MaskAndReplace, MaskAndReplaceConfig

K, T, S = 3, 3, 4  # codes, places, steps
HIDDEN = K
STATES = list(itertools.product(range(K + 1), repeat=T))  # of a picture, hidden places among them
INDEX = {state: i for i, state in enumerate(STATES)}
PICTURES = [state for state in STATES if HIDDEN not in state]
SAID = torch.randn(len(STATES), S + 1, T, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5


def model(codes: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Knows what it says of each state at each step by heart; (B, T, K)."""
    rows = [INDEX[tuple(state)] for state in codes.tolist()]
    return SAID[rows, (t * S / 1000).round().long()]


def process(replaced: float = 0.0) -> Absorbing:
    if replaced:
        return MaskAndReplace(MaskAndReplaceConfig(num_timesteps=S, replaced=replaced), K)
    return Absorbing(AbsorbingConfig(num_timesteps=S), K)


def until(t: int, replaced: float) -> torch.Tensor:
    """q(x_t = column | x_0 = row) of one place, (K + 1, K + 1): t / S hidden, and of the rest some replaced by any code."""
    hidden = t / S
    matrix = (1 - hidden) * (1 - replaced * hidden) * torch.eye(K + 1, dtype=torch.float64)
    matrix[:, :K] += replaced * hidden * (1 - hidden) / K
    matrix[:, HIDDEN] += hidden
    matrix[HIDDEN] = torch.eye(K + 1, dtype=torch.float64)[HIDDEN]
    return matrix


def posterior(t: int, replaced: float) -> torch.Tensor:
    """q(x_{t-1} | x_t, x_0) of one place by Bayes' rule, indexed [x_0, x_t, x_{t-1}]."""
    before = until(t - 1, replaced)
    step = torch.linalg.solve(before, until(t, replaced))  # q(x_t = column | x_{t-1} = row)
    assert step.min() > -1e-12 and torch.allclose(step.sum(dim=1), torch.ones(K + 1, dtype=torch.float64))
    joint = before[:, None, :] * step.T[None]  # (K + 1, K + 1, K + 1)
    return torch.nan_to_num(joint / joint.sum(dim=2, keepdim=True))


@functools.cache
def backwards(t: int, replaced: float = 0.0) -> torch.Tensor:
    """p(x_{t-1} = column | x_t = row) of whole states: at each place the posterior, averaged over what is believed of x_0.

    That is what the model says of the place, and by Bayes' rule what is seen there.
    What cannot be (a seen code that is not x_0, where none is replaced) has no posterior; a seen code then stays.
    """
    of_place = posterior(t, replaced)[:K]  # (K, K + 1, K + 1)
    rows = []
    for i, state in enumerate(STATES):
        said = SAID[i, t].softmax(dim=1)  # (T, K)
        believed = said * until(t, replaced)[:K, list(state)].T  # (T, K)
        believed = torch.nan_to_num(believed / believed.sum(dim=1, keepdim=True))
        places = [
            torch.einsum("k,kp->p", believed[j], of_place[:, state[j]])
            if state[j] == HIDDEN or replaced
            else of_place[state[j], state[j]]
            for j in range(T)
        ]
        rows.append(torch.einsum("a,b,c->abc", *places).flatten())
    return torch.stack(rows)


def likelihoods(replaced: float = 0.0) -> torch.Tensor:
    """p(x_0) of all states: the chain run backwards from all hidden."""
    p = torch.zeros(len(STATES), dtype=torch.float64)
    p[INDEX[(HIDDEN,) * T]] = 1
    for t in range(S, 0, -1):
        p = p @ backwards(t, replaced)
    return p


def chance_of(state: tuple[int, ...], picture: tuple[int, ...], t: int, replaced: float) -> float:
    """q(x_t | x_0)."""
    return math.prod(until(t, replaced)[picture[j], state[j]].item() for j in range(T))


def brute_bound(picture: tuple[int, ...], replaced: float = 0.0) -> float:
    """sum over t of E_q KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), the last step's being -log p(x_0 | x_1)."""
    total = 0.0
    for t in range(1, S + 1):
        of_place, p = posterior(t, replaced), backwards(t, replaced)
        for i, state in enumerate(STATES):
            weight = chance_of(state, picture, t, replaced)
            if weight:
                q = torch.einsum("a,b,c->abc", *(of_place[picture[j], state[j]] for j in range(T))).flatten()
                total += weight * torch.special.xlogy(q, q / p[i].clamp(min=1e-300)).sum().item()
    return total


MASKS = [hidden for hidden in itertools.product((False, True), repeat=T) if any(hidden)]


def chance(hidden: tuple[bool, ...], t: int) -> float:
    """Of these hidden places, when one of them is hidden for sure and any may have been it."""
    return sum(
        math.prod(t / S if hidden[j] else 1 - t / S for j in range(T) if j != sure) / T for sure in range(T) if hidden[sure]
    )


def enumerated_bound(picture: tuple[int, ...]) -> float:
    """The mean of what `nats` says over all times and all places that may be hidden."""
    total, absorbing = 0.0, process()
    for t in range(1, S + 1):
        for hidden in MASKS:
            weight = chance(hidden, t) / S
            said = absorbing.nats(model, torch.tensor([picture]), torch.tensor([t]), torch.tensor([hidden]))
            total += weight * said.item()
    return total


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return mk.fold_in(torch.tensor([seed, 0]), torch.arange(n))


SOME = [(0, 0, 0), (2, 1, 0), (1, 1, 2)]


@pytest.mark.parametrize("picture", SOME)
def test_the_bound_is_the_sum_of_divergences_over_all_steps(picture):
    assert enumerated_bound(picture) == pytest.approx(brute_bound(picture), rel=1e-9)


@pytest.mark.parametrize("replaced", [0.3, 1.0])
@pytest.mark.parametrize("picture", SOME)
def test_the_bound_with_replaced_codes_is_the_sum_too(picture, replaced):
    total, codes = 0.0, torch.tensor([picture])
    for t in range(1, S + 1):
        for state in STATES:
            said = process(replaced).nats(model, codes, torch.tensor([t]), torch.tensor([state]))
            total += chance_of(state, picture, t, replaced) / S * said.item()
    assert total == pytest.approx(brute_bound(picture, replaced), rel=1e-9)


def test_codes_are_hidden_and_replaced_as_often_as_they_should_be():
    draws, codes = 20000, torch.tensor([0, 1, 2]).expand(20000, T)
    for t in range(1, S + 1):
        drawn = process(0.5).noised(codes, torch.full((draws,), t), torch.tensor([t, 0]))
        shares = torch.stack([torch.bincount(drawn[:, j], minlength=K + 1) for j in range(T)]) / draws
        torch.testing.assert_close(shares.double(), until(t, 0.5)[:K], atol=4 * 0.5 / draws**0.5, rtol=0)


def test_replaced_codes_cost_nothing_that_is_not_finite():
    """With codes that the model holds for all but impossible: the loss and its gradient."""
    said = torch.tensor([200.0, 0.0, -200.0]).repeat(200, T, 1).requires_grad_()
    codes = torch.randint(K, (200, T))
    process(0.5).draw_nats(lambda x, t: said, codes, torch.tensor([1, 0])).sum().backward()
    assert said.grad.isfinite().all() and said.grad.abs().max() > 1


@pytest.mark.parametrize("replaced", [0.0, 0.3])
def test_the_chain_is_a_distribution_and_no_likelihood_exceeds_the_bound(replaced):
    p = likelihoods(replaced)
    assert p[[INDEX[x] for x in PICTURES]].sum().item() == pytest.approx(1, abs=1e-12)
    gaps = [brute_bound(x, replaced) + math.log(p[INDEX[x]].item()) for x in (SOME if replaced else PICTURES)]
    assert min(gaps) > 0 and max(gaps) > 0.1


def test_a_model_that_needs_no_order_meets_its_likelihood():
    """Where codes are independent and the model knows their shares, the bound is -log p itself."""
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]], dtype=torch.float64)
    absorbing = process()
    hidden, rows = torch.tensor(MASKS), len(MASKS)  # (7, T)
    for picture in PICTURES:
        codes, total = torch.tensor([picture]).expand(rows, T), 0.0
        for t in range(1, S + 1):
            weight = torch.tensor([chance(mask, t) for mask in MASKS], dtype=torch.float64) / S  # (7,)
            said = absorbing.nats(lambda x, t: shares.log().expand(rows, T, K), codes, torch.full((rows,), t), hidden)
            total += (weight * said).sum().item()
        assert total == pytest.approx(-sum(math.log(shares[j, x].item()) for j, x in enumerate(picture)), rel=1e-9)


def test_with_replaced_codes_too_it_meets_its_likelihood():
    """It says the same of a place whatever is seen there; how far that is to be believed is not the model's to learn."""
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]], dtype=torch.float64)
    states = torch.tensor(STATES)  # (64, T)
    for picture in SOME:
        codes, total = torch.tensor([picture]).expand(len(STATES), T), 0.0
        for t in range(1, S + 1):
            weight = torch.tensor([chance_of(state, picture, t, 0.3) for state in STATES], dtype=torch.float64) / S  # (64,)
            times = torch.full((len(STATES),), t)
            said = process(0.3).nats(lambda x, t: shares.log().expand(len(x), T, K), codes, times, states)
            total += (weight * said).sum().item()
        assert total == pytest.approx(-sum(math.log(shares[j, x].item()) for j, x in enumerate(picture)), rel=1e-9)


@pytest.mark.parametrize("replaced", [0.0, 0.3])
def test_drawn_times_and_places_find_the_bound(replaced):
    absorbing, picture = process(replaced), (2, 1, 0)
    codes = torch.tensor([picture]).expand(50, T)
    means = torch.stack([absorbing.draw_nats(model, codes, key).mean() for key in keys(200)])  # (200,)
    error = means.std() / 200**0.5
    wanted = brute_bound(picture, replaced)
    assert abs(means.mean() - wanted) < 4 * error < 0.1 * wanted


def test_places_are_hidden_as_often_as_their_chance_says():
    draws = 20000
    for t in range(1, S + 1):
        drawn = process().hidden(torch.Size((draws, T)), torch.full((draws,), t), torch.tensor([t, 0]))
        for mask in MASKS:
            share = (drawn == torch.tensor(mask)).all(dim=1).double().mean().item()
            assert share == pytest.approx(chance(mask, t), abs=4 * 0.5 / draws**0.5)


def test_each_time_comes_as_often_and_batches_spread_them():
    absorbing = process()
    times = torch.stack([absorbing.times(6, key) for key in keys(4000)])  # (4000, 6)
    for place in range(6):
        assert (torch.bincount(times[:, place], minlength=S + 1)[1:] / 4000 - 1 / S).abs().max() < 0.03
    assert times.min() == 1 and times.max() == S
    counts = torch.nn.functional.one_hot(times - 1, S).sum(dim=1)  # (4000, S)
    assert counts.min() == 1 and counts.max() == 2  # of six times each of four comes once or twice


@pytest.mark.parametrize("replaced", [0.0, 0.3])
def test_pictures_are_drawn_as_often_as_the_chain_gives_them(replaced):
    draws = 6000
    start = torch.full((draws, T), HIDDEN)
    drawn = process(replaced).sample(model, start, S, key=keys(draws))
    counts = torch.zeros(len(STATES))
    for state in drawn.tolist():
        counts[INDEX[tuple(state)]] += 1
    wanted = likelihoods(replaced)
    at = [INDEX[x] for x in PICTURES]
    assert counts[at].sum() == draws
    chi_squared = ((counts[at] - draws * wanted[at]) ** 2 / (draws * wanted[at])).sum()
    assert chi_squared < 26 + 5 * math.sqrt(52)  # mean and deviation of 26 degrees of freedom
    assert ((counts[at] - draws / 27) ** 2 / (draws / 27)).sum() > 200


def test_what_is_given_stays_and_what_is_hidden_is_drawn_by_its_own_key():
    start = torch.tensor([[1, HIDDEN, HIDDEN]]).expand(40, T)
    drawn = process().sample(model, start, 2, key=keys(40))
    assert drawn[:, 0].eq(1).all() and drawn.max() < HIDDEN and len(drawn.unique(dim=0)) > 3
    assert torch.equal(process().sample(model, start[7:9], 2, key=keys(40)[7:9]), drawn[7:9])
    assert torch.equal(process().sample(model, start, 2, key=keys(40), temperature=0.5)[:, 0], start[:, 0])
    sure = process().sample(model, start, 1, key=keys(40), temperature=0.0)
    assert torch.equal(sure[:, 1:], SAID[INDEX[(1, HIDDEN, HIDDEN)], S, 1:].argmax(dim=1).expand(40, 2))


def test_the_surest_place_is_shown_first_where_confidence_orders_them():
    """Of two hidden places one waits: how often which, the table's heat of 2 and Gumbel's noise say."""
    sure = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [30.0, 0.0, 0.0]])
    seen = []

    def telling(codes: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((codes, t))
        return sure.expand(len(codes), T, K)

    start = torch.tensor([[1, HIDDEN, HIDDEN]]).expand(4000, T)
    drawn = process().sample(telling, start, 2, key=keys(4000), order="confidence")
    (first, told), (second, told_later) = seen
    assert torch.equal(first, start) and drawn[:, 0].eq(1).all() and drawn[:, 2].eq(0).all() and drawn.max() < HIDDEN
    assert ((second == HIDDEN).sum(dim=1) == 1).all()
    assert (second[:, 2] == 0).double().mean().item() == pytest.approx(1 / (1 + math.exp(-math.log(3) / 2)), abs=0.03)
    torch.testing.assert_close(told.float(), torch.full((4000,), 2000 / 3))
    torch.testing.assert_close(told_later.float(), torch.full((4000,), 1000 / 3))
    assert torch.bincount(drawn[:, 1], minlength=K).min() > 1200


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        process().sample(model, torch.zeros(1, T, dtype=torch.int64), 0, key=keys(1))
    with pytest.raises(ValueError, match="order must be one of chance, confidence, got 'age'"):
        process().sample(model, torch.zeros(1, T, dtype=torch.int64), 1, key=keys(1), order="age")
    with pytest.raises(ValueError, match="num_timesteps must be at least 1, got 0"):
        AbsorbingConfig(num_timesteps=0)
    with pytest.raises(ValueError, match="replaced must be above 0 and at most 1, got 0"):
        MaskAndReplaceConfig(replaced=0)
