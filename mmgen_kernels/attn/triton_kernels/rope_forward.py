"""qk_norm_rope forward: one launch for q and k, each read and written once."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.attn.triton_kernels.rope_rows import (
    Configuration,
    configuration,
    is_wide,
    load_affine,
    load_parts,
    located_rows,
    located_table,
    normalize,
    pairs_of,
    place_rows,
    store_parts,
    turn,
    two_floats,
    unit_of_tables,
)
from mmgen_kernels.attn.triton_kernels.tiles import contiguous, dense_rows, on, unit_of

# Of a thread: two 16-byte loads of bf16. A row, its weight and the angles of 16 channels are some 60 registers.
LANES, MOST_WARPS = 16, 16


@triton.jit
def rows_forward(
    first, x, x_b, x_t, x_h, weight, bias, out, rows, H,
    cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, eps_high, eps_low,
    D: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of rows from number `first` on, or a token's heads."""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        sample, place, head, number, inside = place_rows(first, rows, T, H, ACROSS, TILES[i])
        at = (sample * x_b + place * x_t + head * x_h) * UNIT
        tiles += (load_parts(x, at, inside, D, P, HALF, REST, INTERLEAVED, WIDE),)
    if NORM is not None:
        tiles, _ = normalize(tiles, H, eps_high, eps_low, NORM, D, P, HALF, REST, ACROSS, TILES)
    for i in tl.static_range(len(TILES)):
        sample, place, head, number, inside = place_rows(first, rows, T, H, ACROSS, TILES[i])
        parts = tiles[i]
        if weight is not None:
            factors = load_affine(weight, head, inside, D, P, HALF, REST, INTERLEAVED, ACROSS, WIDE)
            found = ()
            for j in tl.static_range(len(parts)):
                found += (parts[j] * factors[j],)
            parts = found
        if bias is not None:
            offsets = load_affine(bias, head, inside, D, P, HALF, REST, INTERLEAVED, ACROSS, WIDE)
            found = ()
            for j in tl.static_range(len(parts)):
                found += (parts[j] + offsets[j],)
            parts = found
        parts = turn(
            parts, cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, sample, place, inside, P, False, HALF, REST, TABLE_UNIT, WIDE
        )  # fmt: skip
        store_parts(out, number * D, inside, parts, D, P, HALF, REST, INTERLEAVED)


@triton.jit(do_not_specialize=["T", "S", "q_rows", "k_rows", "q_programs"])
def norm_and_turn(
    q, q_b, q_t, q_h, q_weight, q_bias, q_out, q_rows, H,
    k, k_b, k_t, k_h, k_weight, k_bias, k_out, k_rows, G,
    cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, S, eps_high, eps_low, q_programs,
    D: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
):  # fmt: skip
    """The programs of q, then those of k."""
    program = tl.program_id(0).to(tl.int64)
    if program < q_programs:
        rows_forward(
            program if ACROSS else program * Q_TILES[0][1], q, q_b, q_t, q_h, q_weight, q_bias, q_out, q_rows, H,
            cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, eps_high, eps_low,
            D, P, UNIT, TABLE_UNIT, NORM, ACROSS, INTERLEAVED, WIDE, HALF, REST, Q_TILES,
        )  # fmt: skip
    else:
        program -= q_programs
        rows_forward(
            program if ACROSS else program * K_TILES[0][1], k, k_b, k_t, k_h, k_weight, k_bias, k_out, k_rows, G,
            cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, S, eps_high, eps_low,
            D, P, UNIT, TABLE_UNIT, NORM, ACROSS, INTERLEAVED, WIDE, HALF, REST, K_TILES,
        )  # fmt: skip


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    across_heads: bool,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    (B, T, H, D), (_, S, G, _) = q.shape, k.shape
    P, interleaved = pairs_of(cos, D, interleaved)
    rotated = q.new_empty(q.shape), k.new_empty(k.shape)
    q, k = dense_rows(q), dense_rows(k)
    unit, table_unit = unit_of(q, k), unit_of_tables(cos, sin)
    of_q, of_k = (configuration(heads, D, P, across_heads, LANES, MOST_WARPS) for heads in (H, G))
    q_programs, k_programs = programs_of(B * T, H, across_heads, of_q), programs_of(B * S, G, across_heads, of_k)
    if q_programs + k_programs > 0:
        larger = max(of_q, of_k, key=lambda c: c.num_warps)
        with on(q):
            norm_and_turn[(q_programs + k_programs,)](
                *located_rows(q, unit), contiguous(q_weight), contiguous(q_bias), rotated[0], B * T * H, H,
                *located_rows(k, unit), contiguous(k_weight), contiguous(k_bias), rotated[1], B * S * G, G,
                *located_table(cos, table_unit), *located_table(sin, table_unit), T, S, *two_floats(eps), q_programs,
                D=D, P=P, UNIT=unit, TABLE_UNIT=table_unit, NORM=norm, ACROSS=across_heads, INTERLEAVED=interleaved,
                WIDE=is_wide(q), HALF=of_q.half, REST=of_q.rest, Q_TILES=of_q.tiles, K_TILES=of_k.tiles, **larger.options(),
            )  # fmt: skip
    return rotated


def programs_of(tokens: int, heads: int, across: bool, c: Configuration) -> int:
    return tokens if across else triton.cdiv(tokens * heads, c.rows)
