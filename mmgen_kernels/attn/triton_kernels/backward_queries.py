"""Gradient of queries, and the row sums that the gradients of keys and of the bias need too."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import triton
import triton.language as tl

from mmgen_kernels.attn.triton_kernels.logits import grad_of_logits, load_exponent, row_products, weights_of
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
def walk_keys(
    total, queries, grads, exponent, inner, begin, end, row, rows, keys, k, k_t, v, v_t, bias, bias_t, bias_s, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    for at in tl.range(begin, end, BLOCK_N, disable_licm=D < 128):  # 188 registers become 176 at D = 72; at 128 it spills
        column = at + tl.arange(0, BLOCK_N)
        k_tiles = load_tiles(k, column, keys, k_t, D, IN, UNIT, MASKED)
        weights = weights_of(
            queries, k_tiles, exponent[:, None], row[:, None], rows, column[None, :], keys, bias, bias_t, bias_s, scale, k
        )  # (M, N)
        if MASKED:
            seen = (column < keys)[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= row[:, None])
            weights = tl.where(seen, weights, 0.0)
        v_tiles = load_tiles(v, column, keys, v_t, D, IN, UNIT, MASKED)
        grad_logits = grad_of_logits(weights, contract(grads, v_tiles), inner[:, None], MASKED or bias is not None)
        keys_out = load_out_tiles(k_tiles, k, column, keys, k_t, D, IN, OUT, UNIT, MASKED)
        total = accumulate(total, grad_logits.to(k.dtype.element_ty), keys_out)
    return total


@triton.jit(do_not_specialize=INTEGERS)
def attention_backward_queries(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, bias, bias_b, bias_h, bias_t, bias_s,
    key_lengths, cu_seqlens_q, cu_seqlens_k, grad, grad_b, grad_t, grad_h, lse, grad_lse, delta,
    out, grad_q, new_b, new_t, new_h, T, S, H, group, C, tiles, scale, factor,
    CAUSAL: tl.constexpr, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head: delta, then a walk along the keys, first to last."""
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = head // H, head % H
    start, rows, start_k, keys, first = locate(tile, cu_seqlens_q, cu_seqlens_k, C, T, S, BLOCK_M)
    if first >= rows:
        return
    keys = visible_keys(key_lengths, b, keys)
    row = first + tl.arange(0, BLOCK_M)
    row_0 = tl.cast(head, tl.int64) * T + start
    grads = load_tiles(head_of(grad, grad_b, grad_t, grad_h, b, start, h, UNIT), row, rows, grad_t, D, IN, UNIT, True)
    lse_grad = None if grad_lse is None else grad_lse + row_0
    inner = row_products(head_of(out, new_b, new_t, new_h, b, start, h, UNIT), new_t, grads, lse_grad, row, rows, D, IN, UNIT)
    tl.store(delta + row_0 + row, inner, mask=row < rows)
    if grad_q is not None:
        queries = load_tiles(head_of(q, q_b, q_t, q_h, b, start, h, UNIT), row, rows, q_t, D, IN, UNIT, True)
        k = head_of(k, k_b, k_t, k_h, b, start_k, h // group, UNIT)
        v = head_of(v, v_b, v_t, v_h, b, start_k, h // group, UNIT)
        if bias is not None:
            bias += tl.cast(b, tl.int64) * bias_b + tl.cast(h, tl.int64) * bias_h
        exponent = load_exponent(lse + row_0, row, rows, k)
        end = keys
        whole = keys  # keys before it need no mask, in whole tiles
        if CAUSAL:
            end = tl.minimum(keys, first + BLOCK_M)
            whole = tl.minimum(keys, first + 1)
        whole = whole // BLOCK_N * BLOCK_N
        total = zero_tiles(BLOCK_M, OUT)
        total = walk_keys(
            total, queries, grads, exponent, inner, 0, whole, row, rows, keys, k, k_t, v, v_t, bias, bias_t, bias_s, scale,
            CAUSAL, False, D, IN, OUT, UNIT, BLOCK_N,
        )  # fmt: skip
        total = walk_keys(
            total, queries, grads, exponent, inner, whole, end, row, rows, keys, k, k_t, v, v_t, bias, bias_t, bias_s, scale,
            CAUSAL, True, D, IN, OUT, UNIT, BLOCK_N,
        )  # fmt: skip
        store_tiles(
            head_of(grad_q, new_b, new_t, new_h, b, start, h, UNIT), row, rows, rows, new_t, scaled(total, factor), D, OUT, UNIT
        )
