"""The three operators forward: one kernel, one launch, each activation read and written once."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.modulation.triton_kernels.tiles import (
    activation,
    chip,
    dense,
    gate_value,
    is_wide,
    kind_of,
    lanes_of,
    load_parameter,
    load_tile,
    load_vector,
    on,
    places_of,
    start_of,
    store_tile,
    tiles_of,
    two_floats,
    vector_arguments,
)
from mmgen_kernels.triton_rounding import divide, narrow, reciprocal_root, widen


class Configuration(NamedTuple):
    tiles: tuple[tuple[int, int], ...]
    rows: int  # tokens that a program holds
    num_warps: int

    def constants(self) -> dict[str, object]:
        return {"TILES": self.tiles, "ROWS": self.rows}

    def options(self) -> dict[str, object]:
        # without fusion: what is a product and a sum in one kernel must not be rounded otherwise in another
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def configuration(D: int) -> Configuration:
    """By D alone: how a sum is added up may depend on nothing else that differs between the operators, or the seam would not be bit
    for bit its two halves.

    A thread should have 8 to 16 values: fewer are less than one 16-byte load of bf16, and more than 16, of which the row, a vector
    and an output are live at once, take it past the 64 registers with which 32 warps fit a multiprocessor.
    """
    tiles = tiles_of(D, 4096)
    lanes = lanes_of(tiles)
    rows = 1 << (min(32, max(1, 1536 // lanes)).bit_length() - 1)
    num_warps = min(16, max(4, triton.next_power_of_2(triton.cdiv(rows * lanes, 16 * 32))))
    return Configuration(tiles, rows, num_warps)


def register_limit(c: Configuration, x: Tensor, alone: bool) -> dict[str, int]:
    """ptxas (Triton 3.9) keeps an fp32 norm alone of two rows a program to 48 registers on sm_80 and spills 16 bytes, D = 768;
    told of 64, with which 32 warps fit, it does not."""
    return {"maxnreg": 64} if alone and c.rows == 2 and x.dtype == torch.float32 and chip(x.device) < (9, 0) else {}


@triton.jit
def normalize(values, D, eps_high, eps_low, NORM: tl.constexpr, TILES: tl.constexpr):
    """Tiles of normalized rows, with mean and 1 / deviation, (ROWS,).

    The mean is taken twice: what a rounding of the first leaves of it is the mean of the differences, which are exact where it
    matters, at a mean far from 0. The variance is of differences, in registers.
    """
    count = D * 1.0
    zero = tl.zeros([values[0].shape[0]], values[0].dtype)
    mean = zero
    centred = values
    if NORM == "layer":
        total = zero
        for i in tl.static_range(len(TILES)):
            total += tl.sum(values[i], 1)
        first = divide(total, zero + count)
        total = zero
        for i in tl.static_range(len(TILES)):
            d = TILES[i][0] + tl.arange(0, TILES[i][1])
            total += tl.sum(tl.where((d < D)[None, :], values[i] - first[:, None], 0.0), 1)
        rest = divide(total, zero + count)
        mean = first + rest
        centred = ()
        for i in tl.static_range(len(TILES)):
            d = TILES[i][0] + tl.arange(0, TILES[i][1])
            difference = (values[i] - first[:, None]) - rest[:, None]
            centred += (tl.where((d < D)[None, :], difference, 0.0),)
    total = zero
    for i in tl.static_range(len(TILES)):
        total += tl.sum(centred[i] * centred[i], 1)
    rstd = reciprocal_root(divide(total, zero + count) + (zero + eps_high + eps_low))
    normed = ()
    for i in tl.static_range(len(TILES)):
        normed += (centred[i] * rstd[:, None],)
    return normed, mean, rstd


@triton.jit(do_not_specialize=["N", "T", "gate_span", "shift_span", "scale_span", "shift_2_span", "scale_2_span"])
def modulate_tokens(
    x, x_b, x_t, y, y_b, y_t, rows,
    gate, gate_b, gate_f, gate_span, shift, shift_b, shift_f, shift_span, scale, scale_b, scale_f, scale_span,
    shift_2, shift_2_b, shift_2_f, shift_2_span, scale_2, scale_2_b, scale_2_f, scale_2_span,
    weight, bias, post_weight, table, residual, modulated, modulated_2, statistics, post_statistics,
    N, T, D, post_eps_high, post_eps_low, eps_high, eps_low,
    GATE_FN: tl.constexpr, POST_NORM: tl.constexpr, NORM: tl.constexpr, KINDS: tl.constexpr,
    WIDE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens. residual = x + g(gate) p(y) where y is given, then, where NORM is, the modulated outputs of it, or of x."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = token < N
    sample, place = places_of(token, N, T)
    row = tl.load(rows + token, mask=inside, other=0) if rows is not None else place
    out = token * D
    x_at = sample.to(tl.int64) * x_b + place.to(tl.int64) * x_t
    # the row of the table that each vector adds: those given, in the order of the arguments
    SHIFT: tl.constexpr = 0 if gate is None else 1
    SCALE: tl.constexpr = SHIFT + (0 if shift is None else 1)
    SHIFT_2: tl.constexpr = SCALE + (0 if scale is None else 1)
    SCALE_2: tl.constexpr = SHIFT_2 + (0 if shift_2 is None else 1)

    values = ()
    if y is not None:
        y_at = sample.to(tl.int64) * y_b + place.to(tl.int64) * y_t
        updates = ()
        for i in tl.static_range(len(TILES)):
            updates += (load_tile(y, y_at, inside, D, TILES[i], WIDE),)
        if POST_NORM is not None:
            updates, mean, rstd = normalize(updates, D, post_eps_high, post_eps_low, POST_NORM, TILES)
            tl.store(post_statistics + token * 2, mean, mask=inside)
            tl.store(post_statistics + token * 2 + 1, rstd, mask=inside)
        gate_at = start_of(gate_b, gate_f, gate_span, sample, place, row, KINDS[0])
        for i in tl.static_range(len(TILES)):
            update = updates[i]
            if post_weight is not None:
                update = update * load_parameter(post_weight, 0, D, TILES[i], WIDE)
            if gate is not None:
                g = load_vector(gate, gate_at, table, 0, inside, D, TILES[i], WIDE)
                update = gate_value(g, GATE_FN, WIDE) * update
            total = load_tile(x, x_at, inside, D, TILES[i], WIDE) + update
            store_tile(residual, out, inside, total, D, TILES[i])
            if NORM is not None:
                values += (widen(narrow(total, residual), WIDE),)  # the norm sees the residual as it is stored
    else:
        for i in tl.static_range(len(TILES)):
            values += (load_tile(x, x_at, inside, D, TILES[i], WIDE),)

    if NORM is not None:
        values, mean, rstd = normalize(values, D, eps_high, eps_low, NORM, TILES)
        tl.store(statistics + token * 2, mean, mask=inside)
        tl.store(statistics + token * 2 + 1, rstd, mask=inside)
        shift_at = start_of(shift_b, shift_f, shift_span, sample, place, row, KINDS[1])
        scale_at = start_of(scale_b, scale_f, scale_span, sample, place, row, KINDS[2])
        shift_2_at = start_of(shift_2_b, shift_2_f, shift_2_span, sample, place, row, KINDS[3])
        scale_2_at = start_of(scale_2_b, scale_2_f, scale_2_span, sample, place, row, KINDS[4])
        for i in tl.static_range(len(TILES)):
            n = values[i]
            if weight is not None:
                n = n * load_parameter(weight, 0, D, TILES[i], WIDE)
            if bias is not None:
                n = n + load_parameter(bias, 0, D, TILES[i], WIDE)
            m = n
            if scale is not None:
                m = m * (1.0 + load_vector(scale, scale_at, table, SCALE, inside, D, TILES[i], WIDE))
            if shift is not None:
                m = m + load_vector(shift, shift_at, table, SHIFT, inside, D, TILES[i], WIDE)
            store_tile(modulated, out, inside, m, D, TILES[i])
            if modulated_2 is not None:
                m = n
                if scale_2 is not None:
                    m = m * (1.0 + load_vector(scale_2, scale_2_at, table, SCALE_2, inside, D, TILES[i], WIDE))
                if shift_2 is not None:
                    m = m + load_vector(shift_2, shift_2_at, table, SHIFT_2, inside, D, TILES[i], WIDE)
                store_tile(modulated_2, out, inside, m, D, TILES[i])


# -- launchers --------------------------------------------------------------------------------------------------------


def launch(
    x: Tensor,
    y: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    post_eps: float,
    norm: str | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """residual, modulated, modulated_2, statistics, post_statistics. vectors: gate, shift, scale, shift_2, scale_2."""
    B, T, D = x.shape
    wide = is_wide(x)
    two = vectors[3] is not None or vectors[4] is not None

    def result(there: bool, *shape: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape if there else (0,), dtype=dtype)

    residual = result(y is not None, B, T, D, dtype=x.dtype)
    modulated, modulated_2 = result(norm is not None, B, T, D, dtype=dtype), result(two, B, T, D, dtype=dtype)
    statistics = result(norm is not None, B, T, 2, dtype=torch.float64 if wide else torch.float32)
    post_statistics = result(post_norm is not None, B, T, 2, dtype=torch.float64 if wide else torch.float32)
    if B * T > 0:
        c = configuration(D)
        by_row = rows is not None
        with on(x):
            modulate_tokens[(triton.cdiv(B * T, c.rows),)](
                *activation(x), *activation(y), dense(rows), *(a for v in vectors for a in vector_arguments(v, T, by_row)),
                dense(weight), dense(bias), dense(post_weight), dense(table), residual, modulated, modulated_2 if two else None,
                statistics, post_statistics, B * T, T, D, *two_floats(post_eps), *two_floats(eps),
                GATE_FN=gate_fn, POST_NORM=post_norm, NORM=norm, KINDS=tuple(kind_of(v, T, by_row) for v in vectors),
                WIDE=wide, **c.constants(), **c.options(), **register_limit(c, x, y is None),
            )  # fmt: skip
    return residual, modulated, modulated_2, statistics, post_statistics


def adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = (None, shift, scale, shift_2, scale_2)
    return launch(x, None, vectors, weight, bias, None, table, rows, "identity", None, 0.0, norm, eps, dtype)[1:4]  # type: ignore[return-value]


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    post_eps: float,
) -> tuple[Tensor, Tensor]:
    vectors = (gate, None, None, None, None)
    out = launch(x, y, vectors, None, None, post_weight, table, rows, gate_fn, post_norm, post_eps, None, 0.0, x.dtype)
    return out[0], out[4]


def gate_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    post_eps: float,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    vectors = (gate, shift, scale, shift_2, scale_2)
    return launch(x, y, vectors, weight, bias, post_weight, table, rows, gate_fn, post_norm, post_eps, norm, eps, dtype)
