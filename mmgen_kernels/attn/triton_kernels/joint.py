"""joint_attention: the kernels of attention over two streams, which lie in tensors of their own.

A program has a tile of one stream, whose pointers and strides it takes by the tile's number, and walks the tiles of both, those of
the first stream before those of the second. A tile never has tokens of two streams: of each stream the last one is masked.
"""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.attn import reference
from mmgen_kernels.attn.triton_kernels.backward_keys import walk_queries
from mmgen_kernels.attn.triton_kernels.backward_queries import walk_keys
from mmgen_kernels.attn.triton_kernels.configuration import (
    chip,
    forward_configuration,
    keys_configuration,
    queries_configuration,
)
from mmgen_kernels.attn.triton_kernels.forward import attend, finish, is_prescaled
from mmgen_kernels.attn.triton_kernels.logits import load_exponent, row_products
from mmgen_kernels.attn.triton_kernels.tiles import (
    contiguous,
    dense_rows,
    head_of,
    head_tiles,
    load_tiles,
    on,
    scaled,
    store_tiles,
    strides_of,
    unit_of,
    unit_of_logits,
    visible_keys,
    zero_tiles,
)

INTEGERS = ["q_strides", "k_strides", "v_strides", "out_strides", "grad_strides", "new_q_strides", "new_k_strides"]
INTEGERS += ["T_1", "T_2", "S_1", "S_2", "H", "group", "tiles_1", "tiles"]


# -- a tensor of two streams is a pair of pointers and six strides, for each: from sample to sample, token to token, head to head --


@triton.jit
def one_of(pointers, strides, second, b, h, UNIT: tl.constexpr):
    """Row 0 of a head of the stream that a program chose, and its stride from token to token."""
    pointer = tl.where(second, pointers[1], pointers[0])
    stride = tl.where(second, strides[4], strides[1])
    stride_b, stride_h = tl.where(second, strides[3], strides[0]), tl.where(second, strides[5], strides[2])
    return head_of(pointer, stride_b, stride, stride_h, b, 0, h, UNIT), stride


@triton.jit
def each(pointers, strides, STREAM: tl.constexpr, b, h, UNIT: tl.constexpr):
    """The same of a stream that the compiler knows."""
    stride = strides[3 * STREAM + 1]
    return head_of(pointers[STREAM], strides[3 * STREAM], stride, strides[3 * STREAM + 2], b, 0, h, UNIT), stride


@triton.jit
def place_of(tile, tiles_1, length_1, length_2, BLOCK: tl.constexpr):
    """Of a tile: whether it is the second stream's, its first row there, and how many rows there are."""
    second = tile >= tiles_1
    return second, tl.where(second, tile - tiles_1, tile) * BLOCK, tl.where(second, length_2, length_1)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[n for n in INTEGERS if n not in ("grad_strides", "new_q_strides", "new_k_strides")])
def joint_forward(
    q, q_strides, k, k_strides, v, v_strides, out, out_strides, lengths_1, lengths_2, lse, T_1, T_2, S_1, S_2, H, group,
    tiles_1, tiles, scale, PRESCALED: tl.constexpr, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one stream."""
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    second, first, rows = place_of(tl.program_id(0) % tiles, tiles_1, T_1, T_2, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    q_head, q_t = one_of(q, q_strides, second, b, h, UNIT)
    queries = load_tiles(q_head, row, rows, q_t, D, IN, UNIT, True)
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    divisor = tl.zeros([BLOCK_M], tl.float32)
    totals = zero_tiles(BLOCK_M, OUT)
    for stream in tl.static_range(2):
        keys = visible_keys(lengths_1 if stream == 0 else lengths_2, b, S_1 if stream == 0 else S_2)
        k_head, k_t = each(k, k_strides, stream, b, h // group, UNIT)
        v_head, v_t = each(v, v_strides, stream, b, h // group, UNIT)
        whole = keys // BLOCK_N * BLOCK_N
        for at in tl.range(0, whole, BLOCK_N):
            shift, divisor, totals = attend(
                shift, divisor, totals, queries, at, first, rows, keys, k_head, None, k_t, v_head, None, v_t, None,
                None, 0, 0, scale, False, PRESCALED, False, False, D, IN, OUT, UNIT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        for at in tl.range(whole, keys, BLOCK_N, num_stages=1 if D <= 128 else 2, disable_licm=D <= 128):
            shift, divisor, totals = attend(
                shift, divisor, totals, queries, at, first, rows, keys, k_head, None, k_t, v_head, None, v_t, None,
                None, 0, 0, scale, False, PRESCALED, True, True, D, IN, OUT, UNIT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    out_head, out_t = one_of(out, out_strides, second, b, h, UNIT)
    lse += tl.cast(head, tl.int64) * (T_1 + T_2) + tl.where(second, T_1, 0)
    finish(shift, divisor, totals, out_head, out_t, lse, row, rows, D, OUT, UNIT)


@triton.jit(do_not_specialize=[n for n in INTEGERS if n not in ("out_strides", "new_k_strides")])
def joint_backward_queries(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, out, grad_q, new_q_strides, lengths_1, lengths_2, lse, delta,
    T_1, T_2, S_1, S_2, H, group, tiles_1, tiles, scale, factor, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one stream: delta, then a walk along the keys of both."""
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    second, first, rows = place_of(tl.program_id(0) % tiles, tiles_1, T_1, T_2, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M)
    row_0 = tl.cast(head, tl.int64) * (T_1 + T_2) + tl.where(second, T_1, 0)
    grad_head, grad_t = one_of(grad, grad_strides, second, b, h, UNIT)
    grads = load_tiles(grad_head, row, rows, grad_t, D, IN, UNIT, True)
    out_head, out_t = one_of(out, new_q_strides, second, b, h, UNIT)
    inner = row_products(out_head, out_t, grads, None, row, rows, D, IN, UNIT)
    tl.store(delta + row_0 + row, inner, mask=row < rows)
    if grad_q is not None:
        q_head, q_t = one_of(q, q_strides, second, b, h, UNIT)
        queries = load_tiles(q_head, row, rows, q_t, D, IN, UNIT, True)
        exponent = load_exponent(lse + row_0, row, rows, q_head)
        total = zero_tiles(BLOCK_M, OUT)
        for stream in tl.static_range(2):
            keys = visible_keys(lengths_1 if stream == 0 else lengths_2, b, S_1 if stream == 0 else S_2)
            k_head, k_t = each(k, k_strides, stream, b, h // group, UNIT)
            v_head, v_t = each(v, v_strides, stream, b, h // group, UNIT)
            whole = keys // BLOCK_N * BLOCK_N
            total = walk_keys(
                total, queries, grads, exponent, inner, 0, whole, row, rows, keys, k_head, k_t, v_head, v_t, None, 0, 0, scale,
                False, False, D, IN, OUT, UNIT, BLOCK_N,
            )  # fmt: skip
            total = walk_keys(
                total, queries, grads, exponent, inner, whole, keys, row, rows, keys, k_head, k_t, v_head, v_t, None, 0, 0, scale,
                False, True, D, IN, OUT, UNIT, BLOCK_N,
            )  # fmt: skip
        new_head, new_t = one_of(grad_q, new_q_strides, second, b, h, UNIT)
        store_tiles(new_head, row, rows, rows, new_t, scaled(total, factor), D, OUT, UNIT)


@triton.jit(do_not_specialize=[n for n in INTEGERS if n not in ("out_strides", "new_q_strides")])
def joint_backward_keys(
    q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, grad_k, grad_v, new_k_strides, lengths_1, lengths_2, lse, delta,
    T_1, T_2, S_1, S_2, H, group, tiles_1, tiles, scale, factor, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one head of one stream, for each query head of its group in turn the queries of both."""
    head = tl.program_id(0) // tiles
    b, g = head // (H // group), head % (H // group)
    second, first, length = place_of(tl.program_id(0) % tiles, tiles_1, S_1, S_2, BLOCK_N)
    seen_1, seen_2 = visible_keys(lengths_1, b, S_1), visible_keys(lengths_2, b, S_2)
    keys = tl.where(second, seen_2, seen_1)
    column = first + tl.arange(0, BLOCK_N)
    k_head, k_t = one_of(k, k_strides, second, b, g, UNIT)
    v_head, v_t = one_of(v, v_strides, second, b, g, UNIT)
    k_tiles = load_tiles(k_head, column, keys, k_t, D, IN, UNIT, True)
    v_tiles = load_tiles(v_head, column, keys, v_t, D, IN, UNIT, True)
    k_total, v_total = zero_tiles(BLOCK_N, OUT), zero_tiles(BLOCK_N, OUT)
    for member in tl.range(group, disable_licm=True):
        h = g * group + member
        for stream in tl.static_range(2):
            rows = T_1 if stream == 0 else T_2
            q_head, q_t = each(q, q_strides, stream, b, h, UNIT)
            grad_head, grad_t = each(grad, grad_strides, stream, b, h, UNIT)
            row_0 = tl.cast(b * H + h, tl.int64) * (T_1 + T_2)
            if stream == 1:
                row_0 += T_1
            k_total, v_total = walk_queries(
                k_total, v_total, k_tiles, v_tiles, q_head, q_t, grad_head, grad_t, lse + row_0, delta + row_0, 0,
                tl.where(first < keys, rows, 0), rows, column, keys, None, 0, 0, scale, grad_k is not None, grad_v is not None,
                False, D, IN, OUT, UNIT, BLOCK_M,
            )  # fmt: skip
    if grad_v is not None:
        new_head, new_t = one_of(grad_v, new_k_strides, second, b, g, UNIT)
        store_tiles(new_head, column, length, keys, new_t, v_total, D, OUT, UNIT)
    if grad_k is not None:
        new_head, new_t = one_of(grad_k, new_k_strides, second, b, g, UNIT)
        store_tiles(new_head, column, length, keys, new_t, scaled(k_total, factor), D, OUT, UNIT)


# -- launchers --------------------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]


def located(streams: Pair) -> tuple[Pair, tuple[int, ...]]:
    return streams, (*strides_of(streams[0]), *strides_of(streams[1]))


def tiles_of_streams(streams: Pair, block: int) -> tuple[int, int]:
    """Of the first stream, and of both."""
    first, second = (triton.cdiv(t.shape[1], block) for t in streams)
    return first, first + second


def sizes(queries: Pair, keys: Pair) -> tuple[int, ...]:
    """T_1, T_2, S_1, S_2, H and the heads of queries for one of keys."""
    H = queries[0].shape[2]
    return *(t.shape[1] for t in (*queries, *keys)), H, H // keys[0].shape[2]


def joint_attention(
    q_1: Tensor,
    k_1: Tensor,
    v_1: Tensor,
    q_2: Tensor,
    k_2: Tensor,
    v_2: Tensor,
    key_lengths_1: Tensor | None,
    key_lengths_2: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q_1.dtype == torch.float64:
        return reference.joint_attention(q_1, k_1, v_1, q_2, k_2, v_2, key_lengths_1, key_lengths_2, scale)
    B, _, H, D = q_1.shape
    outs = q_1.new_empty(q_1.shape), q_2.new_empty(q_2.shape)
    lse = q_1.new_empty((B, H, q_1.shape[1] + q_2.shape[1]), dtype=reference.lse_dtype(q_1))
    if lse.numel() == 0:
        return *outs, lse
    q, k, v = ((dense_rows(a), dense_rows(b)) for a, b in ((q_1, q_2), (k_1, k_2), (v_1, v_2)))
    c = forward_configuration(q_1.dtype, D, chip(q_1.device))
    tiles = tiles_of_streams(q, c.block_m)
    with on(q_1):
        joint_forward[(B * H * tiles[1],)](
            *located(q), *located(k), *located(v), *located(outs), contiguous(key_lengths_1), contiguous(key_lengths_2), lse,
            *sizes(q, k), *tiles, scale * unit_of_logits(q_1.dtype), PRESCALED=is_prescaled(None, scale),
            UNIT=unit_of(*q, *k, *v, *outs), **head_tiles(D), **c.constants(), **c.options(),
        )  # fmt: skip
    return *outs, lse


def joint_attention_backward(
    grad_out_1: Tensor | None,
    grad_out_2: Tensor | None,
    q_1: Tensor,
    k_1: Tensor,
    v_1: Tensor,
    q_2: Tensor,
    k_2: Tensor,
    v_2: Tensor,
    key_lengths_1: Tensor | None,
    key_lengths_2: Tensor | None,
    out_1: Tensor,
    out_2: Tensor,
    lse: Tensor,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    if q_1.dtype == torch.float64:
        return reference.joint_attention_backward(
            grad_out_1, grad_out_2, q_1, k_1, v_1, q_2, k_2, v_2, key_lengths_1, key_lengths_2, out_1, out_2, lse, scale, *needs
        )
    B, _, H, D = q_1.shape
    pairs = ((q_1, q_2), (k_1, k_2), (v_1, v_2))
    nobody = lse.numel() == 0 or k_1.shape[1] + k_2.shape[1] == 0  # attends
    # what one stream needs is made for both
    wanted = [needs[i] or needs[i + 3] for i in range(3)]
    new = torch.zeros if nobody else torch.empty
    made = [(new(a.shape, dtype=a.dtype, device=a.device), new(b.shape, dtype=b.dtype, device=b.device)) for a, b in pairs]
    grads = [made[i % 3][i // 3] if need else q_1.new_empty(0) for i, need in enumerate(needs)]
    if nobody:
        return tuple(grads)
    q, k, v = ((dense_rows(a), dense_rows(b)) for a, b in pairs)
    outs = out_1.contiguous(), out_2.contiguous()
    upstream = (
        torch.zeros_like(out_1) if grad_out_1 is None else dense_rows(grad_out_1),
        torch.zeros_like(out_2) if grad_out_2 is None else dense_rows(grad_out_2),
    )
    grad_q, grad_k, grad_v = (pair if want else None for pair, want in zip(made, wanted, strict=True))
    delta = torch.empty_like(lse, dtype=torch.float32)  # (B, H, T_1 + T_2)
    of_streams = (*located(q), *located(k), *located(v), *located(upstream))
    new_q, new_k = (located(pair)[1] for pair in made[:2])
    lengths = contiguous(key_lengths_1), contiguous(key_lengths_2)
    floats = (scale * unit_of_logits(q_1.dtype), scale)
    constants = {"UNIT": unit_of(*q, *k, *v, *upstream, *outs), **head_tiles(D)}
    at = q_1.dtype, D, chip(q_1.device)
    with on(q_1):
        c = queries_configuration(*at, packed=True)  # where addresses of two streams are in registers, too, not all fits
        tiles = tiles_of_streams(q, c.block_m)
        joint_backward_queries[(B * H * tiles[1],)](
            *of_streams, outs, grad_q, new_q, *lengths, lse, delta, *sizes(q, k), *tiles, *floats,
            **constants, **c.constants(), **c.options(),
        )  # fmt: skip
        c = keys_configuration(*at, joint=True)
        tiles = tiles_of_streams(k, c.block_n)
        if wanted[1] or wanted[2]:
            joint_backward_keys[(B * k_1.shape[2] * tiles[1],)](
                *of_streams, grad_k, grad_v, new_k, *lengths, lse, delta, *sizes(q, k), *tiles, *floats,
                **constants, **c.constants(), **c.options(),
            )  # fmt: skip
    return tuple(grads)
