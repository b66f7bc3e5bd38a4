"""The judge of the vq races is right itself, and every rival is called rightly."""

import pytest
import torch

from benchmarks import harness, vq, vq_oracle

CPU = torch.device("cpu")


def by_hand(x, codebook):
    """The contract in scalar Python, whose floats are fp64 and whose products are never fused."""
    best = []
    for row in x.double().tolist():
        sums = []
        for code in codebook.double().tolist():
            total = 0.0
            for a, b in zip(row, code, strict=True):
                total += (a - b) * (a - b)
            sums.append(total)
        best.append(sums.index(min(sums)))
    return torch.tensor(best)


def test_the_definition_is_the_contract():
    x, codebook = vq.gaussian(vq.parse_shape("9x13x5"))
    codebook[7] = codebook[2]  # an exact tie: the lower index wins
    x[3] = codebook[7]
    assert torch.equal(vq_oracle.nearest_by_definition(x, codebook), by_hand(x, codebook))
    assert vq_oracle.nearest_by_definition(x, codebook)[3] == 2


@pytest.mark.parametrize("name", vq.DATA_SETS)
@pytest.mark.parametrize("width", [1, 3, 8, 33])
def test_candidates_lose_nothing_on_hard_data(name, width, monkeypatch):
    monkeypatch.setattr(vq_oracle, "CHUNK_ELEMENTS", 1000)  # several chunks
    change = vq.DATA_SETS[name][0]
    x, codebook = change(*vq.gaussian({"N": 40, "K": 96, "D": width, "H": 1}))
    assert torch.equal(vq_oracle.nearest(x, codebook), vq_oracle.nearest_by_definition(x, codebook))


def test_near_ties_below_the_resolution_of_the_product():
    """Codes one fp32 ulp apart, far from the origin: the product cannot order them, the definition does."""
    codebook = torch.full((16, 4), 1000.0)
    for index in range(1, 16):
        codebook[index] = torch.nextafter(codebook[index - 1], torch.tensor(torch.inf))
    x = codebook[[5, 11, 0, 15]]
    assert vq_oracle.nearest(x, codebook).tolist() == [5, 11, 0, 15]


def test_heads_and_counting():
    x, codebook = vq.gaussian(vq.parse_shape("10x16x4h3"))
    truth = vq_oracle.nearest(x, codebook)
    assert truth.shape == (3, 10) and torch.equal(truth[1], vq_oracle.nearest(x[1], codebook[1]))
    assert vq_oracle.count_wrong(truth, truth) == {"rows": 30, "wrong": 0, "wrong_percent": 0.0}
    assert vq_oracle.count_wrong(truth + 1, truth) == {"rows": 30, "wrong": 30, "wrong_percent": 100.0}


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_training_oracle_is_autograd_in_fp64(beta):
    x, codebook = (tensor.double().requires_grad_() for tensor in vq.gaussian(vq.parse_shape("12x6x5")))
    indices, upstream = vq_oracle.nearest(x.detach(), codebook.detach()), torch.randn(12, 5, dtype=torch.float64)
    chosen = codebook[indices]
    loss = (chosen - x.detach()).square().mean() + beta * (chosen.detach() - x).square().mean()
    ((x + (chosen - x).detach()) * upstream).sum().backward(retain_graph=True)
    loss.backward()
    truth = vq_oracle.training_step(x.detach(), codebook.detach(), indices, upstream, beta)
    for got, true in zip((loss.detach(), x.grad, codebook.grad), truth, strict=True):
        torch.testing.assert_close(got, true)


def judged(case, contestant):
    """The record that the harness would write before the race."""
    given = case.inputs(False)[contestant.inputs]
    reason = harness.reason_against(contestant, case, CPU)
    if reason is not None:
        pytest.skip(reason)
    return case.judge(contestant, given, contestant.make(*given)())


RIVALS = [contestant for contestant in vq.LOOKUPS if not contestant.name.startswith("ours") and not contestant.compiles]


@pytest.mark.parametrize("contestant", RIVALS, ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("shape", ["50x33x6", "20x16x4h3"])
def test_rivals_find_the_codes(contestant, shape):
    errors = judged(vq.lookup_case(shape, CPU), contestant)
    assert errors["wrong"] == 0 and errors["rows"] == (50 if shape == "50x33x6" else 60)


STEPS = [contestant for contestant in vq.STEPS if contestant.name != "ours" and not contestant.compiles]


@pytest.mark.parametrize("contestant", STEPS, ids=lambda contestant: contestant.name)
def test_rivals_take_the_training_step(contestant):
    errors = judged(vq.training_case("50x33x6", CPU), contestant)
    assert errors["wrong"] == 0 and errors["error"] < 1e-5


def test_the_gaussian_twin_has_as_many_scores():
    case = vq.adversarial_case("many-codes", CPU, "8x64x4")
    data, twin = (case.inputs(False)[key] for key in ("data", "gaussian"))
    assert data[0].shape[0] * data[1].shape[0] == twin[0].shape[0] * twin[1].shape[0]


def test_the_oracle_checks_every_row_unless_there_are_too_many():
    assert vq._oracle_rows(vq.parse_shape("16384x16384x8")).step == 1
    assert vq._oracle_rows(vq.parse_shape(vq.MEMORY_SHAPE)).step == 2
