"""The three operators backward: one launch over chunks of tokens, which writes the gradients of activations and of what each token
has for itself, and leaves partial sums of the rest; one launch that adds those."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.modulation.triton_kernels.forward import Configuration
from mmgen_kernels.modulation.triton_kernels.sums import chunks_of, owner, sum_partials
from mmgen_kernels.modulation.triton_kernels.tiles import (
    activation,
    chip,
    dense,
    gate_slope,
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
    vector_arguments,
)
from mmgen_kernels.triton_rounding import divide

VECTORS = ("gate", "shift", "scale", "shift_2", "scale_2")
SUMMED = (*VECTORS, "weight", "bias", "post_weight")


def configuration(D: int) -> Configuration:
    """Live at once are, of each value, the normalized row, the gradients before and after the scale, and a sum for each of three
    vectors, beside 40 registers of addresses. 12 values in a thread of 4 warps are 128 registers or some more: 3 or 4 programs to
    a multiprocessor, 37 kB of reads on the way, more than the 26 kB that 4.3 TB/s times 0.8 us ask of each of 132.

    Never more than 8 warps: with 16 a thread has but 128 registers, and the addresses are in each of them. D = 6144 then spilled
    with any sum more, and D = 3840 took a multiprocessor for one program; 8 warps hold them in 229 and 128.
    """
    tiles = tiles_of(D, 2048)
    lanes = lanes_of(tiles)
    rows = 1 << (min(32, max(1, 1536 // lanes)).bit_length() - 1)
    return Configuration(tiles, rows, 4 if rows * lanes <= 12 * 4 * 32 else 8)


def register_limit(
    c: Configuration, dtypes: set[torch.dtype], alone: bool, post_norm: str | None, capability: tuple[int, int]
) -> dict[str, int]:
    """Left to itself ptxas aims at 80 or 128 registers in these, and spills two; told of 128 it needs no more (Triton 3.9).

    `alone`, a norm with at most two sums and nothing else to write: in fp32 105 registers at D = 1536 and all at 5120, 20 values a
    thread, where a third sum, a token's own gradients, or bf16 gradients would not fit. With a norm of the update: all at D = 2304,
    9 values a thread.
    """
    values = c.rows * lanes_of(c.tiles) // (32 * c.num_warps)  # that a thread has of a row
    norm = alone and dtypes == {torch.float32} and values <= 20 and capability >= (10, 0)
    sandwich = post_norm is not None and c.num_warps == 8 and values <= 9 and capability >= (9, 0)
    sandwich = sandwich and dtypes <= {torch.bfloat16, torch.float16}
    return {"maxnreg": 128} if norm or sandwich else {}


@triton.jit
def zeros(ROWS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    return tl.zeros([ROWS, TILE[1]], tl.float64 if WIDE else tl.float32)


@triton.jit
def norm_tile(
    grad, grad_at, grad_2, grad_2_at, x, x_at, mean, rstd, scale, scale_at, scale_2, scale_2_at, weight, table,
    SCALE: tl.constexpr, SCALE_2: tl.constexpr, inside, D, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of both outputs, the normalized row, and the gradients of what the modulation and what the weight took."""
    normed = (load_tile(x, x_at, inside, D, TILE, WIDE) - mean[:, None]) * rstd[:, None]
    dm = tl.zeros_like(normed)
    dm_2 = dm
    dn = dm
    if grad is not None:
        dm = load_tile(grad, grad_at, inside, D, TILE, WIDE)
        dn = dm
        if scale is not None:
            dn = dn * (1.0 + load_vector(scale, scale_at, table, SCALE, inside, D, TILE, WIDE))
    if grad_2 is not None:
        dm_2 = load_tile(grad_2, grad_2_at, inside, D, TILE, WIDE)
        if scale_2 is not None:
            dn = dn + dm_2 * (1.0 + load_vector(scale_2, scale_2_at, table, SCALE_2, inside, D, TILE, WIDE))
        else:
            dn = dn + dm_2
    g = dn
    if weight is not None:
        g = g * load_parameter(weight, 0, D, TILE, WIDE)
    return dm, dm_2, normed, dn, g


@triton.jit(do_not_specialize=["N", "T", "segment", "pieces", "length", "gate_span", "scale_span", "scale_2_span"])
def backward_chunks(
    grad_residual, grad_residual_b, grad_residual_t, grad, grad_b, grad_t, grad_2, grad_2_b, grad_2_t,
    x, x_b, x_t, y, y_b, y_t, statistics, post_statistics, rows, order, begins, ends,
    gate, gate_b, gate_f, gate_span, scale, scale_b, scale_f, scale_span, scale_2, scale_2_b, scale_2_f, scale_2_span,
    weight, bias, post_weight, table, grad_x, grad_y,
    grad_gate, grad_shift, grad_scale, grad_shift_2, grad_scale_2, partials,
    N, T, D, segment, pieces, length,
    GATE_FN: tl.constexpr, POST_NORM: tl.constexpr, NORM: tl.constexpr, KINDS: tl.constexpr, TABLE_ROWS: tl.constexpr,
    SLOTS: tl.constexpr, SLOT_COUNT: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One chunk, ROWS tokens at a time. partials (chunks, SLOT_COUNT, D): SLOTS says where the sum of each gradient goes, in the
    order gate, shift, scale, shift_2, scale_2, weight, bias, post_weight, -1 for those not summed. grad_gate to grad_scale_2 are
    those that each token has for itself."""
    chunk = tl.program_id(0).to(tl.int64)
    if order is not None:
        begin = tl.load(begins + chunk)
        end = tl.load(ends + chunk)
    else:
        begin = chunk // pieces * segment
        end = begin + segment
        begin += chunk % pieces * length
        end = tl.minimum(begin + length, end)
    count = D * 1.0
    sums = ()
    for i in tl.static_range(len(TILES)):
        of_tile = ()
        for q in tl.static_range(len(SLOTS)):
            if SLOTS[q] >= 0:
                of_tile += (zeros(ROWS, TILES[i], WIDE),)
        sums += (of_tile,)

    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        inside = at < end
        token = tl.load(order + at, mask=inside, other=0) if order is not None else at
        sample, place = places_of(token, N, T)
        row = tl.load(rows + token, mask=inside, other=0) if rows is not None else place
        sample_64, place_64 = sample.to(tl.int64), place.to(tl.int64)
        out = token * D
        if NORM is not None:
            x_at = sample_64 * x_b + place_64 * x_t
            grad_at = sample_64 * grad_b + place_64 * grad_t
            grad_2_at = sample_64 * grad_2_b + place_64 * grad_2_t
            scale_at = start_of(scale_b, scale_f, scale_span, sample, place, row, KINDS[2])
            scale_2_at = start_of(scale_2_b, scale_2_f, scale_2_span, sample, place, row, KINDS[4])
            mean = tl.load(statistics + token * 2, mask=inside, other=0.0)
            rstd = tl.load(statistics + token * 2 + 1, mask=inside, other=0.0)
            of_g = tl.zeros_like(mean)
            of_product = tl.zeros_like(mean)
            held = ()
            for i in tl.static_range(len(TILES)):
                terms = norm_tile(
                    grad, grad_at, grad_2, grad_2_at, x, x_at, mean, rstd, scale, scale_at, scale_2, scale_2_at, weight, table,
                    TABLE_ROWS[2], TABLE_ROWS[4], inside, D, TILES[i], WIDE,
                )  # fmt: skip
                of_g += tl.sum(terms[4], 1)
                of_product += tl.sum(terms[4] * terms[2], 1)
                held += (terms,)
            zero = tl.zeros_like(mean)
            of_g = divide(of_g, zero + count)
            of_product = divide(of_product, zero + count)
        if y is not None:
            y_at = sample_64 * y_b + place_64 * y_t
            gate_at = start_of(gate_b, gate_f, gate_span, sample, place, row, KINDS[0])
            if POST_NORM is not None:
                post_mean = tl.load(post_statistics + token * 2, mask=inside, other=0.0)
                post_rstd = tl.load(post_statistics + token * 2 + 1, mask=inside, other=0.0)
                of_update = tl.zeros_like(post_mean)
                of_post_product = tl.zeros_like(post_mean)
        grad_residual_at = sample_64 * grad_residual_b + place_64 * grad_residual_t
        updates = ()
        new_sums = ()
        for i in tl.static_range(len(TILES)):
            dr = zeros(ROWS, TILES[i], WIDE)
            of_gate, of_shift, of_scale, of_shift_2, of_scale_2 = dr, dr, dr, dr, dr
            of_weight, of_bias, of_post_weight = dr, dr, dr
            if NORM is not None:
                dm, dm_2, normed, dn, g = held[i]
                dr = g - of_g[:, None] if NORM == "layer" else g
                dr = rstd[:, None] * (dr - normed * of_product[:, None])
                if POST_NORM is not None:
                    d = TILES[i][0] + tl.arange(0, TILES[i][1])
                    dr = tl.where((d < D)[None, :], dr, 0.0)  # for the sums over the row below
                n = normed
                if weight is not None:
                    n = n * load_parameter(weight, 0, D, TILES[i], WIDE)
                if bias is not None:
                    n = n + load_parameter(bias, 0, D, TILES[i], WIDE)
                of_shift, of_scale, of_shift_2, of_scale_2 = dm, dm * n, dm_2, dm_2 * n
                of_weight, of_bias = dn * normed, dn
            if grad_residual is not None:
                of_residual = load_tile(grad_residual, grad_residual_at, inside, D, TILES[i], WIDE)
                dr = of_residual if NORM is None else dr + of_residual
            if grad_x is not None:
                store_tile(grad_x, out, inside, dr, D, TILES[i])
            if y is not None:
                normed_y = load_tile(y, y_at, inside, D, TILES[i], WIDE)
                if POST_NORM is not None:
                    normed_y = (normed_y - post_mean[:, None]) * post_rstd[:, None]
                update = normed_y
                dy = dr
                if post_weight is not None:
                    update = update * load_parameter(post_weight, 0, D, TILES[i], WIDE)
                if gate is not None:
                    g = load_vector(gate, gate_at, table, TABLE_ROWS[0], inside, D, TILES[i], WIDE)
                    of_gate = dr * update * gate_slope(g, GATE_FN)
                    dy = dy * gate_value(g, GATE_FN, WIDE)
                of_post_weight = dy * normed_y
                if post_weight is not None:
                    dy = dy * load_parameter(post_weight, 0, D, TILES[i], WIDE)
                if POST_NORM is not None:
                    of_update += tl.sum(dy, 1)
                    of_post_product += tl.sum(dy * normed_y, 1)
                    updates += ((dy, normed_y),)
                elif grad_y is not None:
                    store_tile(grad_y, out, inside, dy, D, TILES[i])
            if grad_gate is not None:
                store_tile(grad_gate, out, inside, of_gate, D, TILES[i])
            if grad_shift is not None:
                store_tile(grad_shift, out, inside, of_shift, D, TILES[i])
            if grad_scale is not None:
                store_tile(grad_scale, out, inside, of_scale, D, TILES[i])
            if grad_shift_2 is not None:
                store_tile(grad_shift_2, out, inside, of_shift_2, D, TILES[i])
            if grad_scale_2 is not None:
                store_tile(grad_scale_2, out, inside, of_scale_2, D, TILES[i])
            found = (of_gate, of_shift, of_scale, of_shift_2, of_scale_2, of_weight, of_bias, of_post_weight)
            of_tile = ()
            for q in tl.static_range(len(SLOTS)):
                if SLOTS[q] >= 0:
                    of_tile += (sums[i][SLOTS[q]] + found[q],)
            new_sums += (of_tile,)
        sums = new_sums
        if POST_NORM is not None and grad_y is not None:
            zero = tl.zeros_like(post_mean)
            of_update = divide(of_update, zero + count)
            of_post_product = divide(of_post_product, zero + count)
            for i in tl.static_range(len(TILES)):
                dy, normed_y = updates[i]
                if POST_NORM == "layer":
                    dy = dy - of_update[:, None]
                dy = post_rstd[:, None] * (dy - normed_y * of_post_product[:, None])
                store_tile(grad_y, out, inside, dy, D, TILES[i])

    for i in tl.static_range(len(TILES)):
        d = TILES[i][0] + tl.arange(0, TILES[i][1])
        for q in tl.static_range(len(SLOTS)):
            if SLOTS[q] >= 0:
                total = tl.sum(sums[i][SLOTS[q]], 0).to(partials.dtype.element_ty)
                tl.store(partials + (chunk * SLOT_COUNT + SLOTS[q]) * D + d, total, mask=d < D)


# -- launchers --------------------------------------------------------------------------------------------------------


def launch(
    grad_residual: Tensor | None,
    grad_modulated: Tensor | None,
    grad_modulated_2: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    statistics: Tensor | None,
    post_statistics: Tensor | None,
    inputs: dict[str, Tensor | None],
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    norm: str | None,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """The gradients by name, empty where nobody needs them. inputs: those of SUMMED."""
    like = y if x is None else x
    assert like is not None
    B, T, D = like.shape
    if inputs["shift_2"] is None and inputs["scale_2"] is None:
        grad_modulated_2 = None  # of an output that is empty
    of = {"x": x, "y": y, **inputs, "table": table}
    grads = {
        name: like.new_empty(0) if tensor is None or not needs[name] else like.new_empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in of.items() if name in needs
    }  # fmt: skip
    there = {name: grad for name, grad in grads.items() if of[name] is not None and needs[name]}
    if B * T == 0:
        for grad in there.values():
            grad.zero_()
        return grads
    by_row = rows is not None
    vectors = tuple(inputs[name] for name in VECTORS)
    given = [name for name in VECTORS if inputs[name] is not None]
    kinds = tuple(kind_of(v, T, by_row) for v in vectors)
    own = {  # of vectors that have an element for each token
        name for name, v, kind in zip(VECTORS, vectors, kinds, strict=True) if kind == "token" or (kind == "sample" and T == 1)
    }
    summed = [name for name in SUMMED if (name in there and name not in own) or ("table" in there and name in given)]
    slots = tuple(summed.index(name) if name in summed else -1 for name in SUMMED)
    wide = is_wide(grad_residual if x is None else x)
    c = configuration(D)
    dtypes = {tensor.dtype for tensor in (grad_residual, grad_modulated, x, y) if tensor is not None}
    limit = register_limit(c, dtypes, y is None and not own and len(summed) <= 2, post_norm, chip(like.device))
    chunks = chunks_of(vectors, rows, B, T, c.rows)
    partials = like.new_empty((chunks.number, len(summed), D), dtype=torch.float64 if wide else torch.float32)
    with on(like):
        backward_chunks[(chunks.number,)](
            *activation(grad_residual), *activation(grad_modulated), *activation(grad_modulated_2), *activation(x), *activation(y),
            dense(statistics), dense(post_statistics), dense(rows), chunks.order, chunks.begins, chunks.ends,
            *(a for name in ("gate", "scale", "scale_2") for a in vector_arguments(inputs[name], T, by_row)),
            dense(inputs["weight"]), dense(inputs["bias"]), dense(inputs["post_weight"]), dense(table),
            there.get("x"), there.get("y"), *(there.get(name) if name in own else None for name in VECTORS), partials,
            B * T, T, D, chunks.segment, chunks.pieces, chunks.length,
            GATE_FN=gate_fn, POST_NORM=post_norm, NORM=norm, KINDS=kinds,
            TABLE_ROWS=tuple(given.index(name) if name in given else 0 for name in VECTORS), SLOTS=slots, SLOT_COUNT=len(summed),
            WIDE=wide, **c.constants(), **c.options(), **limit,
        )  # fmt: skip
        wanted = []
        for slot, name in enumerate(summed):
            index = VECTORS.index(name) if name in VECTORS else -1
            if name in there and name not in own:
                wanted.append((slot, owner(inputs[name], index, T, by_row), there[name]))
            if name in given and "table" in there:
                wanted.append((slot, -1, there["table"][given.index(name)]))
        if wanted:
            sum_partials(partials, chunks, vectors, T, wanted)
    return grads


def adaln_backward(
    grad_modulated: Tensor | None,
    grad_modulated_2: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    norm: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    inputs = dict(zip(SUMMED, (None, shift, scale, shift_2, scale_2, weight, bias, None), strict=True))
    wanted = dict(zip(("x", "shift", "scale", "shift_2", "scale_2", "weight", "bias", "table"), needs, strict=True))
    grads = launch(
        None, grad_modulated, grad_modulated_2, x, None, statistics, None, inputs, table, rows, "identity", None, norm, wanted
    )
    return tuple(grads[name] for name in wanted)


def gate_residual_backward(
    grad_residual: Tensor | None,
    y: Tensor,
    post_statistics: Tensor,
    gate: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    *needs: bool,
) -> tuple[Tensor, ...]:
    inputs = dict.fromkeys(SUMMED) | {"gate": gate, "post_weight": post_weight}
    wanted = dict(zip(("y", "gate", "post_weight", "table"), needs, strict=True))
    grads = launch(
        grad_residual, None, None, None, y, None, post_statistics, inputs, table, rows, gate_fn, post_norm, None, wanted
    )
    return tuple(grads[name] for name in wanted)


def gate_residual_adaln_backward(
    grad_residual: Tensor | None,
    grad_modulated: Tensor | None,
    grad_modulated_2: Tensor | None,
    y: Tensor,
    residual: Tensor,
    statistics: Tensor,
    post_statistics: Tensor,
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
    norm: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    inputs = dict(zip(SUMMED, (gate, shift, scale, shift_2, scale_2, weight, bias, post_weight), strict=True))
    wanted = dict(zip(("x", "y", *SUMMED, "table"), needs, strict=True))
    grads = launch(
        grad_residual, grad_modulated, grad_modulated_2, residual, y, statistics, post_statistics, inputs, table, rows,
        gate_fn, post_norm, norm, wanted,
    )  # fmt: skip
    return tuple(grads[name] for name in wanted)
