"""Two closed bugs of the cosine metric in fp64: a bound that counted too few roundings, and squares that overflow."""

import math

import numpy as np
import pytest
import torch

import mmgen_kernels as mk

DIM, ULP = 1024, 2.0**-52


def adversarial_pair():
    """x and two codes: code 0 is truly nearer by 2.5 D units of 2^-53, code 1 in fp64, whose roundings all go against it."""
    generator = np.random.default_rng(0)
    x, a, b = [1.0], [1.0], [1.0]

    def fraction(v):
        return (v / ULP) % 1

    for d in range(1, DIM):
        dots, squares = (2, 1) if d % 2 else (1, 0)  # by how many ulps of 1 the terms of the two codes differ, rounded down
        while len(x) == d:
            i = generator.integers(15_000_000, 30_000_000, 20_000).astype(float)
            p = np.sqrt((i + 0.5 + generator.uniform(0.01, 0.1, i.size)) * ULP)  # p^2 rounds up beside 1
            q = np.sqrt((i - squares + 0.5 - generator.uniform(0.01, 0.1, i.size)) * ULP)  # q^2 rounds down
            y = (dots - 0.1) * ULP / (p - q)
            y = (np.floor(y * p / ULP) + 0.5 - generator.uniform(0.01, 0.06, i.size)) * ULP / p  # y p rounds down
            good = (fraction(y * p) > 0.4) & (fraction(y * p) < 0.5) & (fraction(y * q) > 0.5) & (fraction(y * q) < 0.6)
            good &= (fraction(p * p) > 0.5) & (fraction(q * q) < 0.5) & (y < 1e-2)
            good &= np.floor(y * p / ULP) - np.floor(y * q / ULP) == dots
            good &= np.floor(p * p / ULP) - np.floor(q * q / ULP) == squares
            if good.any():
                w = int(good.argmax())
                x.append(float(y[w])), a.append(float(p[w])), b.append(float(q[w]))
    return x, (a, b)


def test_cosine_counts_every_rounding():
    x, codes = adversarial_pair()

    def value(code):
        dot = squared = 0.0
        for p, q in zip(x, code, strict=True):
            dot, squared = dot + p * q, squared + q * q
        return dot / math.sqrt(squared)

    assert value(codes[1]) > value(codes[0])
    rows, codebook = torch.tensor([x], dtype=torch.float64), torch.tensor(codes, dtype=torch.float64)
    assert mk.nearest_code(rows, codebook, metric="cosine").tolist() == [1]
    assert mk.nearest_code(rows, codebook.flip(0), metric="cosine").tolist() == [0]


@pytest.mark.parametrize("huge", [1e300, -1e300, 1e160, 1.34e154])
@pytest.mark.parametrize("size", [1e-100, 1.0, 1e10, 1e100])
def test_codes_whose_squares_overflow(huge, size):
    x = torch.tensor([[size, 0.0], [-size, 0.0], [0.0, size], [size, size]], dtype=torch.float64)
    for codebook in ([[-1.0, 0.0], [huge, 0.0]], [[huge, 0.0], [-1.0, 0.0]], [[huge, huge], [-1.0, -1e-3], [0.0, 0.0]],
                     [[-1.0, 0.0], [0.0, 1e-170], [huge, 0.0], [1e-162, 1e-162]]):  # fmt: skip
        codes = torch.tensor(codebook, dtype=torch.float64)
        for metric in ("cosine", "l2", "dot"):
            with mk.use_backend("reference"):
                wanted = mk.nearest_code(x, codes, metric=metric)
            assert torch.equal(mk.nearest_code(x, codes, metric=metric), wanted), (metric, codebook)
