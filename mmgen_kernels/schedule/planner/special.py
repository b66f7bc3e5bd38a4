"""Special functions in fp64, so that the package needs no more than torch."""

from __future__ import annotations

import functools
import math

from mmgen_kernels.schedule.planner.floats import div, expm1


def phi(k: int, z: float) -> float:
    """
    phi_k(z) = (phi_(k-1)(z) - 1 / (k - 1)!) / z, phi_0 = exp: what exponential integrators weigh their terms by.

    The series sum_j z^j / (j + k)! where the recurrence would cancel: it loses k log10(1 / |z|) digits.
    """
    if abs(z) < 1:
        term = total = 1.0 / math.factorial(k)
        for j in range(1, 20):
            term *= z / (j + k)
            total += term
        return total
    value = div(expm1(z), z)
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def exponential_adams(nodes: list[float], length: float, rate: float) -> list[float]:
    """
    What each of the values at the nodes is weighed by in an exponential Adams method: the integrals over 0 <= u <= length of
    l_j(u) e^(rate u), l_j the Lagrange polynomial that is 1 at nodes[j] and 0 at the others.
    """
    moments = [length ** (k + 1) * _moment(k, rate * length) for k in range(len(nodes))]
    weights = []
    for j, node in enumerate(nodes):
        powers, scale = [1.0], 1.0  # the polynomial's coefficients, ascending
        for other in (*nodes[:j], *nodes[j + 1 :]):
            powers = [a - other * b for a, b in zip([0.0, *powers], [*powers, 0.0], strict=True)]
            scale *= node - other
        weights.append(div(sum(c * m for c, m in zip(powers, moments, strict=True)), scale))
    return weights


def _moment(k: int, z: float) -> float:
    """The integral over 0 <= v <= 1 of v^k e^(z v). By parts it loses k! / |z|^k of its digits, hence the series."""
    if abs(z) < 2:
        return sum(z**j / (math.factorial(j) * (j + k + 1)) for j in range(30))
    value = div(expm1(z), z)
    for j in range(1, k + 1):
        value = (expm1(z) + 1 - j * value) / z
    return value


def beta_ppf(p: float, a: float, b: float) -> float:
    """
    The percent point function of the beta distribution: the x in [0, 1] with I_x(a, b) = p. NaN outside 0 <= p <= 1.

    Newton's steps in u = x^a, in which I_x is nearly a straight line at 0, kept inside a bracket. The half of larger x is mirrored,
    so the series for I_x is asked for x <= 1/2 alone. For a and b of the order of 1.
    """
    if not 0 <= p <= 1:
        return math.nan
    if p > _middle(a, b):
        return 1 - _lower_ppf(1 - p, b, a)
    return _lower_ppf(p, a, b)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1."""
    if x > 0.5:
        return 1 - beta_cdf(1 - x, b, a)
    total = 0.0
    for c in _series(a, b):
        total = total * x + c
    return x**a * total / _beta(a, b)


@functools.cache
def _series(a: float, b: float) -> tuple[float, ...]:
    """Of I_x B(a, b) / x^a = sum_n (1 - b)(2 - b)...(n - b) / (n! (a + n)) x^n for x <= 1/2, the last coefficient first."""
    factor, terms = 1.0, [1.0 / a]
    while abs(factor) * 0.5 ** len(terms) > 1e-17 * terms[0] and len(terms) < 200:
        n = len(terms)
        factor *= (n - b) / n
        terms.append(factor / (a + n))
    return tuple(reversed(terms))


@functools.cache
def _middle(a: float, b: float) -> float:
    return beta_cdf(0.5, a, b)


@functools.cache
def _beta(a: float, b: float) -> float:
    return math.gamma(a) * math.gamma(b) / math.gamma(a + b)


def _lower_ppf(p: float, a: float, b: float) -> float:
    if p == 0:
        return 0.0
    low, high = 0.0, 0.5**a
    u = min(p * a * _beta(a, b), high)
    for _ in range(100):
        x = u ** (1 / a)
        excess = beta_cdf(x, a, b) - p
        low, high = (low, u) if excess > 0 else (u, high)
        before, u = u, u - excess * a * _beta(a, b) / (1 - x) ** (b - 1)
        if not low <= u <= high:
            u = (low + high) / 2
        if abs(u - before) <= 1e-9 * u:  # as the next step would be 1e-18 of it
            break
    return u ** (1 / a)


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix x = right, by elimination with row pivots; infinite or NaN where the matrix is singular."""
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(i + 1, n):
            factor = div(rows[j][i], rows[i][i])
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = div(rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n)), rows[i][i])
    return x
