"""qk_norm_rope backward: one launch over chunks of rows, which writes the gradients of q and k and leaves partial sums of those of
weights and biases; one launch that adds these, in the order of the chunks."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.attn.triton_kernels.rope_rows import (
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
    total_of,
    turn,
    two_floats,
    unit_of_tables,
)
from mmgen_kernels.attn.triton_kernels.tiles import contiguous, dense_rows, on, unit_of
from mmgen_kernels.triton_rounding import divide, narrow

# Live at once are, of each value, the normalized row, the gradient turned back and two sums: 12 values in a thread are some 100
# registers. Never more than 8 warps: with 16 a thread has but 128 registers.
LANES, MOST_WARPS = 12, 8
# Tiles, across heads tokens, of a chunk. Partial sums of weight and bias across heads are 8 bytes a channel written and as much
# read, beside 6 STEPS of bf16 that the rows are: 17 %, most of it in L2. More would lose digits: the error of an fp32 sum grows
# with the root of its length, and partial sums are added in fp64.
STEPS = 16
TILE = (64, 64)  # chunks x columns that a program adds


@triton.jit
def zero_parts(ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    parts = ()
    if HALF > 0:
        parts += (tl.zeros([ROWS, HALF], dtype), tl.zeros([ROWS, HALF], dtype))
    if REST > 0:
        parts += (tl.zeros([ROWS, REST], dtype),)
    return parts


@triton.jit
def rows_backward(
    first, grad, grad_b, grad_t, grad_h, x, x_b, x_t, x_h, weight, grad_x, rows, H, sums_weight, sums_bias,
    cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, eps_high, eps_low,
    D: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, TILES: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_BIAS: tl.constexpr,
):  # fmt: skip
    """A tile of rows, or a token's heads: writes grad_x, and returns the sums of weight and bias with what these rows add.

    With n the normalized row, u the gradient turned back and g = u weight: dx = rstd (g - n mean(g n) - mean(g)), the last for
    "layer"; the sums grow by u n and u.
    """
    normed = ()
    upstream = ()
    for i in tl.static_range(len(TILES)):
        sample, place, head, number, inside = place_rows(first, rows, T, H, ACROSS, TILES[i])
        if NORM is not None:
            at = (sample * x_b + place * x_t + head * x_h) * UNIT
            normed += (load_parts(x, at, inside, D, P, HALF, REST, INTERLEAVED, WIDE),)
        at = (sample * grad_b + place * grad_t + head * grad_h) * UNIT
        parts = load_parts(grad, at, inside, D, P, HALF, REST, INTERLEAVED, WIDE)
        parts = turn(
            parts, cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, sample, place, inside, P, True, HALF, REST, TABLE_UNIT, WIDE
        )  # fmt: skip
        upstream += (parts,)
    if NORM is not None:
        normed, rstd = normalize(normed, H, eps_high, eps_low, NORM, D, P, HALF, REST, ACROSS, TILES)
    new_weight = ()
    new_bias = ()
    grads = ()
    products = ()
    for i in tl.static_range(len(TILES)):
        sample, place, head, number, inside = place_rows(first, rows, T, H, ACROSS, TILES[i])
        u = upstream[i]
        if OF_BIAS:
            parts = ()
            for j in tl.static_range(len(u)):
                parts += (sums_bias[i][j] + u[j],)
            new_bias += (parts,)
        if OF_WEIGHT:
            parts = ()
            for j in tl.static_range(len(u)):
                parts += (sums_weight[i][j] + u[j] * normed[i][j],)
            new_weight += (parts,)
        if weight is not None:
            factors = load_affine(weight, head, inside, D, P, HALF, REST, INTERLEAVED, ACROSS, WIDE)
            parts = ()
            for j in tl.static_range(len(u)):
                parts += (u[j] * factors[j],)
            u = parts
        grads += (u,)
        if NORM is not None:
            parts = ()
            for j in tl.static_range(len(u)):
                parts += (u[j] * normed[i][j],)
            products += (parts,)
    if NORM is not None:
        of_product = total_of(products, ACROSS)
        count = tl.zeros_like(of_product) + (H * D if ACROSS else D) * 1.0
        of_product = divide(of_product, count)
        if NORM == "layer":
            of_g = divide(total_of(grads, ACROSS), count)
    if grad_x is not None:
        for i in tl.static_range(len(TILES)):
            sample, place, head, number, inside = place_rows(first, rows, T, H, ACROSS, TILES[i])
            parts = ()
            for j in tl.static_range(len(grads[i])):
                g = grads[i][j]
                if NORM is not None:
                    if NORM == "layer":
                        g = g - of_g[:, None]
                    g = rstd[:, None] * (g - normed[i][j] * of_product[:, None])
                parts += (g,)
            store_parts(grad_x, number * D, inside, parts, D, P, HALF, REST, INTERLEAVED)
    return new_weight, new_bias


@triton.jit
def chunk_backward(
    chunk, grad, grad_b, grad_t, grad_h, x, x_b, x_t, x_h, weight, grad_x, partials, rows, H,
    cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, eps_high, eps_low,
    D: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, TILES: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_BIAS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """partials (chunks, OF_WEIGHT + OF_BIAS, channels of a weight)."""
    sums_weight = ()
    sums_bias = ()
    for i in tl.static_range(len(TILES)):
        if OF_WEIGHT:
            sums_weight += (zero_parts(TILES[i][1], HALF, REST, WIDE),)
        if OF_BIAS:
            sums_bias += (zero_parts(TILES[i][1], HALF, REST, WIDE),)
    STEP: tl.constexpr = 1 if ACROSS else TILES[0][1]
    begin = chunk * (STEPS * STEP)
    end = tl.minimum(begin + STEPS * STEP, (rows // H if ACROSS else rows).to(tl.int64))
    for first in range(begin, end, STEP):
        sums_weight, sums_bias = rows_backward(
            first, grad, grad_b, grad_t, grad_h, x, x_b, x_t, x_h, weight, grad_x, rows, H, sums_weight, sums_bias,
            cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, eps_high, eps_low,
            D, P, UNIT, TABLE_UNIT, NORM, ACROSS, INTERLEAVED, WIDE, HALF, REST, TILES, OF_WEIGHT, OF_BIAS,
        )  # fmt: skip
    width = (chunk * 0 + H) * D if ACROSS else D
    at = partials + chunk * (OF_WEIGHT + OF_BIAS) * width
    if OF_WEIGHT:
        store_sums(at, sums_weight, H, D, P, HALF, REST, INTERLEAVED, ACROSS, TILES)
    if OF_BIAS:
        store_sums(at + OF_WEIGHT * width, sums_bias, H, D, P, HALF, REST, INTERLEAVED, ACROSS, TILES)


@triton.jit
def store_sums(
    pointer, sums, H, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACROSS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row, across heads that of each head."""
    for i in tl.static_range(len(TILES)):
        if ACROSS:
            head = (TILES[i][0] + tl.arange(0, TILES[i][1])).to(tl.int64)
            store_parts(pointer, head * D, head < H, sums[i], D, P, HALF, REST, INTERLEAVED)
        else:
            parts = ()
            for j in tl.static_range(len(sums[i])):
                parts += (tl.sum(sums[i][j], 0, keep_dims=True),)
            one = tl.zeros([1], tl.int64)
            store_parts(pointer, one, one == 0, parts, D, P, HALF, REST, INTERLEAVED)


@triton.jit(do_not_specialize=["T", "S", "q_rows", "k_rows", "q_chunks"])
def backward_chunks(
    grad_q_out, grad_q_b, grad_q_t, grad_q_h, q, q_b, q_t, q_h, q_weight, grad_q, q_partials, q_rows, H,
    grad_k_out, grad_k_b, grad_k_t, grad_k_h, k, k_b, k_t, k_h, k_weight, grad_k, k_partials, k_rows, G,
    cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, S, eps_high, eps_low, q_chunks,
    D: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr, OF: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The chunks of q, then those of k. OF: whether the gradients of q_weight, k_weight, q_bias and k_bias are wanted. A side whose
    upstream gradient is None has no chunks."""
    chunk = tl.program_id(0).to(tl.int64)
    if chunk < q_chunks:
        if grad_q_out is not None:
            chunk_backward(
                chunk, grad_q_out, grad_q_b, grad_q_t, grad_q_h, q, q_b, q_t, q_h, q_weight, grad_q, q_partials, q_rows, H,
                cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, T, eps_high, eps_low,
                D, P, UNIT, TABLE_UNIT, NORM, ACROSS, INTERLEAVED, WIDE, HALF, REST, Q_TILES, OF[0], OF[2], STEPS,
            )  # fmt: skip
    else:
        if grad_k_out is not None:
            chunk_backward(
                chunk - q_chunks, grad_k_out, grad_k_b, grad_k_t, grad_k_h, k, k_b, k_t, k_h, k_weight, grad_k, k_partials,
                k_rows, G,
                cos, cos_b, cos_t, cos_p, sin, sin_b, sin_t, sin_p, S, eps_high, eps_low,
                D, P, UNIT, TABLE_UNIT, NORM, ACROSS, INTERLEAVED, WIDE, HALF, REST, K_TILES, OF[1], OF[3], STEPS,
            )  # fmt: skip


@triton.jit
def add_chunks(partials, out, chunks, width, SLOT: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """A tile of columns: the chunks tile by tile, then a tree in registers."""
    column = tl.program_id(0).to(tl.int64) * TILE[1] + tl.arange(0, TILE[1])
    total = tl.zeros([TILE[0], TILE[1]], tl.float64)
    for start in range(0, chunks, TILE[0]):
        chunk = start + tl.arange(0, TILE[0]).to(tl.int64)
        mask = (chunk < chunks)[:, None] & (column < width)[None, :]
        at = ((chunk * SLOTS + SLOT) * width)[:, None] + column[None, :]
        total += tl.load(partials + at, mask=mask, other=0.0).to(tl.float64)
    tl.store(out + column, narrow(tl.sum(total, 0), out), mask=column < width)


@triton.jit(do_not_specialize=["q_chunks", "k_chunks"])
def sum_chunks(
    q_partials, k_partials, grad_q_weight, grad_k_weight, grad_q_bias, grad_k_bias, q_chunks, k_chunks, q_width, k_width,
    OF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (p, j) has a tile of columns of gradient j."""
    job = tl.program_id(1)
    if OF[0] and job == 0:
        add_chunks(q_partials, grad_q_weight, q_chunks, q_width, 0, OF[0] + OF[2], TILE)
    if OF[1] and job == 1:
        add_chunks(k_partials, grad_k_weight, k_chunks, k_width, 0, OF[1] + OF[3], TILE)
    if OF[2] and job == 2:
        add_chunks(q_partials, grad_q_bias, q_chunks, q_width, OF[0], OF[0] + OF[2], TILE)
    if OF[3] and job == 3:
        add_chunks(k_partials, grad_k_bias, k_chunks, k_width, OF[1], OF[1] + OF[3], TILE)


def qk_norm_rope_backward(
    grad_rotated_q: Tensor | None,
    grad_rotated_k: Tensor | None,
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
    *needs: bool,
) -> tuple[Tensor, ...]:
    grads = tuple(
        q.new_empty(0) if of is None or not need else q.new_empty(of.shape, dtype=of.dtype)
        for of, need in zip((q, k, q_weight, k_weight, q_bias, k_bias), needs, strict=True)
    )
    there = [g if need and of is not None else None for g, need, of in
             zip(grads, needs, (q, k, q_weight, k_weight, q_bias, k_bias), strict=True)]  # fmt: skip
    D = q.shape[-1]
    P, interleaved = pairs_of(cos, D, interleaved)
    sides = []
    for i, (x, upstream) in enumerate(((q, grad_rotated_q), (k, grad_rotated_k))):
        B, T, H, _ = x.shape
        c = configuration(H, D, P, across_heads, LANES, MOST_WARPS)
        wanted = [t is not None for t in there[i::2]]
        if upstream is None or x.numel() == 0 or not any(wanted):
            for gradient in there[i::2]:
                if gradient is not None:
                    gradient.zero_()
            upstream, chunks, wanted = None, 0, [False] * 3
        else:
            chunks = triton.cdiv(B * T, STEPS) if across_heads else triton.cdiv(B * T * H, STEPS * c.rows)
        width = H * D if across_heads else D
        partials = x.new_empty((chunks, sum(wanted[1:]), width), dtype=torch.float64 if is_wide(x) else torch.float32)
        sides.append((upstream, x, there[i], partials, c, wanted, chunks, width))
    (grad_q, _, to_q, q_partials, of_q, q_wanted, q_chunks, q_width) = sides[0]
    (grad_k, _, to_k, k_partials, of_k, k_wanted, k_chunks, k_width) = sides[1]
    if q_chunks + k_chunks == 0:
        return grads
    q, k, grad_q, grad_k = (None if t is None else dense_rows(t) for t in (q, k, grad_q, grad_k))
    unit, table_unit = unit_of(*[t for t in (q, k, grad_q, grad_k) if t is not None]), unit_of_tables(cos, sin)
    OF = (q_wanted[1], k_wanted[1], q_wanted[2], k_wanted[2])
    larger = max(of_q, of_k, key=lambda c: c.num_warps)
    with on(q):
        backward_chunks[(q_chunks + k_chunks,)](
            *located_rows(grad_q, unit), *located_rows(q, unit), contiguous(q_weight), to_q, q_partials, q.numel() // D, q.shape[2],
            *located_rows(grad_k, unit), *located_rows(k, unit), contiguous(k_weight), to_k, k_partials, k.numel() // D, k.shape[2],
            *located_table(cos, table_unit), *located_table(sin, table_unit), q.shape[1], k.shape[1], *two_floats(eps), q_chunks,
            D=D, P=P, UNIT=unit, TABLE_UNIT=table_unit, NORM=norm, ACROSS=across_heads, INTERLEAVED=interleaved, WIDE=is_wide(q),
            HALF=of_q.half, REST=of_q.rest, Q_TILES=of_q.tiles, K_TILES=of_k.tiles, OF=OF, STEPS=STEPS, **larger.options(),
        )  # fmt: skip
        if any(OF):
            sum_chunks[(triton.cdiv(max(q_width, k_width), TILE[1]), 4)](
                q_partials, k_partials, *there[2:], q_chunks, k_chunks, q_width, k_width,
                OF=OF, TILE=TILE, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return grads
