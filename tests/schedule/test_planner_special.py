"""The planner's special functions against closed forms, and its floats against 0-dim tensors."""

import math

import pytest
import torch

from mmgen_kernels.schedule.planner import floats, special
from mmgen_kernels.schedule.planner.special import beta_cdf, beta_ppf, phi, solve

SHARES = [0.0, 1e-12, 1e-3, 0.1, 0.25, 0.5, 0.6180339887, 0.9, 0.999, 1.0]


@pytest.mark.parametrize("p", SHARES)
def test_beta_ppf_closed_forms(p):
    assert beta_ppf(p, 0.5, 0.5) == pytest.approx(math.sin(math.pi * p / 2) ** 2, rel=4e-15, abs=0)
    assert beta_ppf(p, 3.0, 1.0) == pytest.approx(p ** (1 / 3), rel=4e-15, abs=0)
    assert beta_ppf(p, 1.0, 2.5) == pytest.approx(-math.expm1(math.log1p(-p) / 2.5) if p < 1 else 1.0, rel=4e-15, abs=0)
    assert beta_ppf(p, 1.0, 1.0) == pytest.approx(p, rel=4e-15, abs=0)


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.3, 2.0), (4.0, 0.7)])
def test_beta_ppf_is_the_inverse(p, a, b):
    x = beta_ppf(p, a, b)
    assert beta_cdf(x, a, b) == pytest.approx(p, rel=1e-13, abs=1e-14)
    assert x == pytest.approx(1 - beta_ppf(1 - p, b, a), abs=1e-14) or p == 1e-12  # which 1 - p does not hold


def test_beta_ppf_takes_few_steps(monkeypatch):
    """A scheduler with beta sigmas asks for a thousand of them when it is made."""
    asked = []
    monkeypatch.setattr(special, "beta_cdf", lambda *at: asked.append(at) or beta_cdf(*at))
    for i in range(1000):
        beta_ppf(i / 999, 0.6, 0.6)
    assert len(asked) < 4 * 1000


def test_beta_ppf_outside():
    assert math.isnan(beta_ppf(-0.1, 0.6, 0.6)) and math.isnan(beta_ppf(1.1, 0.6, 0.6)) and math.isnan(beta_ppf(math.nan, 0.6, 0.6))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [-30.0, -2.0, -1.0, -0.999, -1e-3, 1e-8, 0.5, 1.0, 7.0])
def test_phi_is_the_integral(k, z):
    """phi_k(z) = int_0^1 e^((1 - t) z) t^(k - 1) / (k - 1)! dt, by Gauss and Legendre's rule on pieces."""
    node = math.sqrt(0.6)
    total, pieces = 0.0, 400
    for i in range(pieces):
        for offset, weight in ((-node, 5 / 18), (0.0, 8 / 18), (node, 5 / 18)):
            t = (i + 0.5 + 0.5 * offset) / pieces
            total += weight / pieces * math.exp((1 - t) * z) * t ** (k - 1) / math.factorial(k - 1)
    assert phi(k, z) == pytest.approx(total, rel=1e-11, abs=0)


def test_phi_at_zero():
    assert [phi(k, 0.0) for k in (1, 2, 3)] == [1.0, 0.5, pytest.approx(1 / 6)]


def test_solve():
    matrix = [[0.0, 2.0, 1.0], [1.0, 1e-9, 3.0], [4.0, 5.0, 6.0]]
    x = solve(matrix, [7.0, -8.0, 9.0])
    expected = torch.linalg.solve(torch.tensor(matrix, dtype=torch.float64), torch.tensor([7.0, -8.0, 9.0], dtype=torch.float64))
    assert x == pytest.approx(expected.tolist(), rel=1e-13)


def test_solve_singular_is_not_finite():
    assert not all(math.isfinite(x) for x in solve([[1.0, 1.0], [1.0, 1.0]], [1.0, 2.0]))


VALUES = [0.0, -0.0, 1.0, -2.5, 1e-320, 1e200, 800.0, -800.0, math.inf, -math.inf, math.nan]


def same(ours, tensor):
    theirs = tensor.item()
    return (
        math.isnan(theirs)
        if math.isnan(ours)
        else ours == pytest.approx(theirs, rel=1e-15) and math.copysign(1, ours) == math.copysign(1, theirs)
    )


@pytest.mark.parametrize("name", ["sqrt", "log", "exp", "expm1"])
@pytest.mark.parametrize("x", VALUES)
def test_floats_as_tensors(name, x):
    assert same(getattr(floats, name)(x), getattr(torch, name)(torch.tensor(x, dtype=torch.float64)))


@pytest.mark.parametrize("a", VALUES)
@pytest.mark.parametrize("b", VALUES)
def test_division_as_tensors(a, b):
    assert same(floats.div(a, b), torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64))


@pytest.mark.parametrize("x", [0.1, 1 + 2**-24, 1 + 3 * 2**-24, 1e300, -1e300, 1e-46, math.inf, math.nan])
def test_f32_rounds_as_tensors(x):
    assert same(floats.f32(x), torch.tensor(x, dtype=torch.float64).float())
