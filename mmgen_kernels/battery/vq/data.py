"""Data sets for lookups: easy ones, and those on which distances computed in fp32 are wrong, equal or not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmgen_kernels.battery.draws import rand, randint, randn
from mmgen_kernels.battery.laws import INTEGERS

Maker = Callable[[int, int, int, torch.dtype, torch.dtype], tuple[Tensor, Tensor]]  # (N, K, D, dtypes) -> x, codebook
DATA_SETS: dict[str, Maker] = {}


def data_set(make: Callable[[int, int, int, torch.dtype], tuple[Tensor, Tensor]]) -> Callable:
    """Registers a maker of fp64 tensors; the set is what they become in the dtypes asked for."""

    def cast(n: int, k: int, d: int, x_dtype: torch.dtype, codebook_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, codebook = make(n, k, d, torch.float16 if torch.float16 in (x_dtype, codebook_dtype) else x_dtype)
        return x.to(x_dtype), codebook.to(codebook_dtype)

    DATA_SETS[make.__name__] = cast
    return make


def add_ulps(values: Tensor, ulps: Tensor) -> Tensor:
    """`values` moved away from zero by that many units in the last place."""
    return (values.view(INTEGERS[values.dtype]) + ulps.to(INTEGERS[values.dtype])).view(values.dtype)


def powers(dtype: torch.dtype) -> int:
    """The decimal exponent that stands for "huge" and, negated, for "tiny"; in fp16 it reaches into the subnormals."""
    return 4 if dtype == torch.float16 else 20


@data_set
def gaussian(n, k, d, dtype):
    return randn(n, d, seed=1), randn(k, d, seed=2)


@data_set
def normalised(n, k, d, dtype):
    return tuple(v / v.norm(dim=-1, keepdim=True) for v in gaussian(n, k, d, dtype))


@data_set
def taming(n, k, d, dtype):
    """The initialisation of taming-transformers: every code near 0, every distance near |x|^2."""
    return randn(n, d, seed=1), (2 * rand(k, d, seed=2) - 1) / k


@data_set
def offset(n, k, d, dtype):
    """|x - c|^2 is 1e-8 of |x|^2. In bf16 and fp16 most codes become equal."""
    return tuple(v + 1e4 for v in gaussian(n, k, d, dtype))


@data_set
def spread(n, k, d, dtype):
    """Norms of codes 100x apart."""
    x, codebook = gaussian(n, k, d, dtype)
    return x, codebook * 10 ** (2 * rand(k, 1, seed=3) - 1)


@data_set
def all_equal(n, k, d, dtype):
    return randn(n, d, seed=1), randn(1, d, seed=2).expand(k, d).clone()


@data_set
def fourfold(n, k, d, dtype):
    """Every code four times, shuffled: the lowest index must win."""
    distinct = randn((k + 3) // 4, d, seed=2)
    return randn(n, d, seed=1), distinct[randint(0, len(distinct), (k,), seed=3)]


@data_set
def zeros(n, k, d, dtype):
    """Zero rows and zero codes among others."""
    x, codebook = gaussian(n, k, d, dtype)
    x[::3] = 0
    codebook[1::4] = 0
    return x, codebook


@data_set
def all_zero(n, k, d, dtype):
    return torch.zeros(n, d, dtype=torch.float64), torch.zeros(k, d, dtype=torch.float64)


@data_set
def negative_zeros(n, k, d, dtype):
    """-0 equals +0: codes that differ only in the sign of a zero tie, and the lowest index wins."""
    x, codebook = grid(n, k, d, dtype)
    return x, torch.where((codebook == 0) & (rand(k, d, seed=5) < 0.5), -0.0, codebook)


@data_set
def huge(n, k, d, dtype):
    return tuple(v * 10.0 ** powers(dtype) for v in gaussian(n, k, d, dtype))


@data_set
def tiny(n, k, d, dtype):
    return tuple(v * 10.0 ** -powers(dtype) for v in gaussian(n, k, d, dtype))


@data_set
def mixed_rows(n, k, d, dtype):
    """Rows of every magnitude, codes of one."""
    x, codebook = gaussian(n, k, d, dtype)
    return x * 10 ** (powers(dtype) * (2 * rand(n, 1, seed=3) - 1)), codebook


@data_set
def mixed_codes(n, k, d, dtype):
    """Rows and codes of every magnitude."""
    x, codebook = mixed_rows(n, k, d, dtype)
    return x, codebook * 10 ** (powers(dtype) * (2 * rand(k, 1, seed=4) - 1))


@data_set
def mixed_columns(n, k, d, dtype):
    """One dimension dwarfs the others."""
    scale = 10 ** (powers(dtype) * (rand(d, seed=3) - 0.5))
    return tuple(v * scale for v in gaussian(n, k, d, dtype))


@data_set
def vanishing(n, k, d, dtype):
    """Rows so much larger than the codes that x - c rounds to x in most dimensions, in fp64 too, and codes nearly tie."""
    x, codebook = gaussian(n, k, d, dtype)
    largest, smallest = (15, -24) if dtype == torch.float16 else (60, 0)
    return torch.sign(x) * 2.0 ** (largest - 14 * rand(n, d, seed=3)), codebook * 2.0**smallest


@data_set
def grid(n, k, d, dtype):
    """Small integers: distances are exact in every dtype and tie often, between different codes too."""
    return randint(-2, 3, (n, d), seed=1).double(), randint(-2, 3, (k, d), seed=2).double()


@data_set
def hits(n, k, d, dtype):
    """Rows that are codes: the smallest distance is 0."""
    codebook = randn(k, d, seed=2)
    return codebook[randint(0, k, (n,), seed=1)], codebook


@data_set
def clusters(n, k, d, dtype):
    """Codes in tight groups, as after k-means on clustered data: many candidates within the bound."""
    centres = randn(max(1, k // 16), d, seed=2)
    x, codebook = (centres[randint(0, len(centres), (count,), seed=count)] for count in (n, k))
    return x + 1e-4 * randn(n, d, seed=3), codebook + 1e-4 * randn(k, d, seed=4)


def not_finite(rows: float | None, codes: float | None, name: str) -> None:
    """The data set `name`: those values, of either sign, in two of three rows or codes."""

    def make(n, k, d, dtype):
        x, codebook = gaussian(n, k, d, dtype)
        for tensor, value in ((x, rows), (codebook, codes)):
            if value is not None:
                tensor[0::3, 0] = value
                tensor[1::3, d - 1] = -value
        return x, codebook

    make.__name__ = name
    data_set(make)


not_finite(torch.nan, None, "nan_rows")
not_finite(torch.inf, None, "inf_rows")
not_finite(None, torch.nan, "nan_codes")
not_finite(None, torch.inf, "inf_codes")
not_finite(torch.inf, torch.nan, "inf_rows_nan_codes")


@data_set
def all_nan_codes(n, k, d, dtype):
    return randn(n, d, seed=1), torch.full((k, d), torch.nan, dtype=torch.float64)


def near_ties(n: int, k: int, d: int, x_dtype: torch.dtype, codebook_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes that differ by one unit in the last place of each coordinate, and rows as close."""
    base = randn(d, seed=2)
    codebook = add_ulps(base.to(codebook_dtype).expand(k, d).contiguous(), randint(-1, 2, (k, d), seed=3))
    x = add_ulps(base.to(x_dtype).expand(n, d).contiguous(), randint(-1, 2, (n, d), seed=4))
    return x, codebook


def far_ties(n: int, k: int, d: int, x_dtype: torch.dtype, codebook_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same codes, rows far from them."""
    return randn(n, d, seed=1).to(x_dtype), near_ties(n, k, d, x_dtype, codebook_dtype)[1]


def ladder(n: int, k: int, d: int, x_dtype: torch.dtype, codebook_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Code k lies k units in the last place from code 0 in one coordinate; rows stand at either end."""
    codebook = randn(d, seed=2).to(codebook_dtype).expand(k, d).clone()
    codebook[:, 0] = add_ulps(codebook[:, 0].contiguous(), torch.arange(k) % 997)
    x = codebook[randint(0, k, (n,), seed=1)].to(x_dtype)
    x[::2, -1] += 1
    return x, codebook


DATA_SETS |= {"near_ties": near_ties, "far_ties": far_ties, "ladder": ladder}
