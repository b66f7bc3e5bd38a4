"""Gradients of keys and values: a program has a tile of keys and walks the queries that see it, first to last."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import triton
import triton.language as tl

from mmgen_kernels.attn.triton_kernels.logits import grad_of_logits, load_exponent, weights_of
from mmgen_kernels.attn.triton_kernels.tiles import (
    accumulate,
    contract,
    head_of,
    load_out_tiles,
    load_tiles,
    locate,
    scaled,
    store_tiles,
    visible_keys,
    zero_tiles,
)

INTEGERS = [
    "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h", "bias_b", "bias_h", "bias_t", "grad_b", "grad_t", "grad_h",
    "new_b", "new_t", "new_h", "T", "S", "H", "group", "C", "tiles",
]  # fmt: skip


@triton.jit
def walk_queries(
    k_total, v_total, k_tiles, v_tiles, q, q_t, grad, grad_t, lse, delta, begin, end, rows, column, keys, bias, bias_t, bias_s,
    scale, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pointers are to row 0 of the sequence. Tiles of weights are (N, M): transposed, so that they are the left operand of both
    products as they lie in registers."""
    for at in tl.range(begin, end, BLOCK_M, disable_licm=True):  # addresses kept over loops are what spills
        row = at + tl.arange(0, BLOCK_M)
        queries = load_tiles(q, row, rows, q_t, D, IN, UNIT, True)
        exponent = load_exponent(lse, row, rows, q)
        weights = weights_of(
            k_tiles, queries, exponent[None, :], row[None, :], rows, column[:, None], keys, bias, bias_t, bias_s, scale, q
        )  # (N, M)
        if CAUSAL:
            weights = tl.where(column[:, None] <= row[None, :], weights, 0.0)
        grads = load_tiles(grad, row, rows, grad_t, D, IN, UNIT, True)
        if OF_VALUES:
            grads_out = load_out_tiles(grads, grad, row, rows, grad_t, D, IN, OUT, UNIT, True)
            v_total = accumulate(v_total, weights.to(grad.dtype.element_ty), grads_out)
        if OF_KEYS:
            inner = tl.load(delta + row, mask=row < rows, other=0.0)
            grad_logits = grad_of_logits(weights, contract(v_tiles, grads), inner[None, :], CAUSAL or bias is not None)
            queries_out = load_out_tiles(queries, q, row, rows, q_t, D, IN, OUT, UNIT, True)
            k_total = accumulate(k_total, grad_logits.to(q.dtype.element_ty), queries_out)
    return k_total, v_total


@triton.jit(do_not_specialize=INTEGERS)
def attention_backward_keys(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, bias, bias_b, bias_h, bias_t, bias_s,
    key_lengths, cu_seqlens_q, cu_seqlens_k, grad, grad_b, grad_t, grad_h, lse, delta,
    grad_k, grad_v, new_b, new_t, new_h, T, S, H, group, C, tiles, scale, factor,
    CAUSAL: tl.constexpr, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one head, for each query head of its group in turn."""
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, g = head // (H // group), head % (H // group)
    start_k, length, start, rows, first = locate(tile, cu_seqlens_k, cu_seqlens_q, C, S, T, BLOCK_N)
    if first >= length:
        return
    keys = visible_keys(key_lengths, b, length)
    column = first + tl.arange(0, BLOCK_N)
    k_tiles = load_tiles(head_of(k, k_b, k_t, k_h, b, start_k, g, UNIT), column, keys, k_t, D, IN, UNIT, True)
    v_tiles = load_tiles(head_of(v, v_b, v_t, v_h, b, start_k, g, UNIT), column, keys, v_t, D, IN, UNIT, True)
    k_total, v_total = zero_tiles(BLOCK_N, OUT), zero_tiles(BLOCK_N, OUT)
    begin = 0
    if CAUSAL:
        begin = first // BLOCK_M * BLOCK_M
    end = tl.where(first < keys, rows, 0)
    for member in tl.range(group, disable_licm=True):  # here it spilled 336 bytes a thread with a bias at D = 72
        h = g * group + member
        q_head = head_of(q, q_b, q_t, q_h, b, start, h, UNIT)
        grad_head = head_of(grad, grad_b, grad_t, grad_h, b, start, h, UNIT)
        row_0 = tl.cast(b * H + h, tl.int64) * T + start
        bias_head = bias
        if bias is not None:
            bias_head = bias + tl.cast(b, tl.int64) * bias_b + tl.cast(h, tl.int64) * bias_h
        k_total, v_total = walk_queries(
            k_total, v_total, k_tiles, v_tiles, q_head, q_t, grad_head, grad_t, lse + row_0, delta + row_0, begin, end, rows,
            column, keys, bias_head, bias_t, bias_s, scale, grad_k is not None, grad_v is not None,
            CAUSAL, D, IN, OUT, UNIT, BLOCK_M,
        )  # fmt: skip
    if grad_v is not None:
        grad_v = head_of(grad_v, new_b, new_t, new_h, b, start_k, g, UNIT)
        store_tiles(grad_v, column, length, keys, new_t, v_total, D, OUT, UNIT)
    if grad_k is not None:
        grad_k = head_of(grad_k, new_b, new_t, new_h, b, start_k, g, UNIT)
        store_tiles(grad_k, column, length, keys, new_t, scaled(k_total, factor), D, OUT, UNIT)
