"""The backward where a head is short: all gradients by one program, which multiplies five times where two kernels do seven times.

The walk is that of `backward_keys`, and each tile of keys adds its share to the gradient of the queries as `backward_queries`
does: the same sums in the same order, so that either way gives the same bits. Between tiles of keys these sums are fp32 in a
scratch that belongs to the program alone: group T D numbers, 72 KiB for 256 queries of 72. There are no more programs than run at
once, each with one head after the other, so that all scratches together stay in the second-level cache.

The loops do not prefetch: with two stages Triton 3.9 for sm_90 spills 120 bytes a thread at D = 72, with one it needs 242
registers.
"""

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
    scaled,
    store_tiles,
    visible_keys,
    zero_tiles,
)

INTEGERS = [
    "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h", "bias_b", "bias_h", "bias_t", "grad_b", "grad_t", "grad_h",
    "out_b", "out_t", "out_h", "new_b", "new_t", "new_h", "T", "S", "H", "group", "heads",
]  # fmt: skip


@triton.jit
def load_sums(scratch, row, rows, later, D: tl.constexpr, OUT: tl.constexpr):
    """Zeros before the first tile of keys."""
    tiles = ()
    for i in tl.static_range(len(OUT)):
        d = OUT[i][0] + tl.arange(0, OUT[i][1])
        mask = (row < rows)[:, None] & (d < D)[None, :] & later
        tiles += (tl.load(scratch + row[:, None] * D + d[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit(do_not_specialize=INTEGERS)
def attention_backward_short(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, bias, bias_b, bias_h, bias_t, bias_s,
    key_lengths, grad, grad_b, grad_t, grad_h, lse, grad_lse, delta,
    out, grad_q, out_b, out_t, out_h, grad_k, grad_v, new_b, new_t, new_h, scratch, T, S, H, group, heads, scale, factor,
    CAUSAL: tl.constexpr, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of keys after the other, `heads` in all, each with its group of query heads."""
    scratch += tl.cast(tl.program_id(0), tl.int64) * group * T * D
    for head in tl.range(tl.program_id(0), heads, tl.num_programs(0)):
        b, g = head // (H // group), head % (H // group)
        keys = visible_keys(key_lengths, b, S)
        row_0 = tl.cast(b * H + g * group, tl.int64) * T
        for member in tl.range(group):
            h = g * group + member
            out_head = head_of(out, out_b, out_t, out_h, b, 0, h, UNIT)
            grad_head = head_of(grad, grad_b, grad_t, grad_h, b, 0, h, UNIT)
            lse_grad = None if grad_lse is None else grad_lse + row_0 + member * T
            for at in tl.range(0, T, BLOCK_M):
                row = at + tl.arange(0, BLOCK_M)
                grads = load_tiles(grad_head, row, T, grad_t, D, IN, UNIT, True)
                inner = row_products(out_head, out_t, grads, lse_grad, row, T, D, IN, UNIT)
                tl.store(delta + row_0 + member * T + row, inner, mask=row < T)
        tl.debug_barrier()  # what a thread has stored, another one loads

        k_head = head_of(k, k_b, k_t, k_h, b, 0, g, UNIT)
        v_head = head_of(v, v_b, v_t, v_h, b, 0, g, UNIT)
        for first in tl.range(0, S, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            k_tiles = load_tiles(k_head, column, keys, k_t, D, IN, UNIT, True)
            v_tiles = load_tiles(v_head, column, keys, v_t, D, IN, UNIT, True)
            keys_out = load_out_tiles(k_tiles, k_head, column, keys, k_t, D, IN, OUT, UNIT, True)
            k_total, v_total = zero_tiles(BLOCK_N, OUT), zero_tiles(BLOCK_N, OUT)
            begin = 0
            if CAUSAL:
                begin = first // BLOCK_M * BLOCK_M
            rows = tl.where((first < keys) | (first == 0), T, 0)  # without keys, zeros are stored
            for member in tl.range(group):
                h = g * group + member
                q_head = head_of(q, q_b, q_t, q_h, b, 0, h, UNIT)
                grad_head = head_of(grad, grad_b, grad_t, grad_h, b, 0, h, UNIT)
                lse_head, delta_head, sums = lse + row_0 + member * T, delta + row_0 + member * T, scratch + member * T * D
                bias_head = bias
                if bias is not None:
                    bias_head = bias + tl.cast(b, tl.int64) * bias_b + tl.cast(h, tl.int64) * bias_h
                for at in tl.range(begin, rows, BLOCK_M, disable_licm=True):  # as in backward_keys
                    row = at + tl.arange(0, BLOCK_M)
                    queries = load_tiles(q_head, row, T, q_t, D, IN, UNIT, True)
                    exponent = load_exponent(lse_head, row, T, k)
                    # (N, M)
                    weights = weights_of(
                        k_tiles, queries, exponent[None, :], row[None, :], T, column[:, None], keys, bias_head, bias_t, bias_s,
                        scale, k,
                    )  # fmt: skip
                    seen = (column < keys)[:, None]
                    if CAUSAL:
                        seen = seen & (column[:, None] <= row[None, :])
                    weights = tl.where(seen, weights, 0.0)
                    grads = load_tiles(grad_head, row, T, grad_t, D, IN, UNIT, True)
                    grads_out = load_out_tiles(grads, grad_head, row, T, grad_t, D, IN, OUT, UNIT, True)
                    v_total = accumulate(v_total, weights.to(grad.dtype.element_ty), grads_out)
                    inner = tl.load(delta_head + row, mask=row < T, other=0.0)
                    grad_logits = grad_of_logits(weights, contract(v_tiles, grads), inner[None, :], CAUSAL or bias is not None)
                    grad_logits = grad_logits.to(q.dtype.element_ty)
                    queries_out = load_out_tiles(queries, q_head, row, T, q_t, D, IN, OUT, UNIT, True)
                    k_total = accumulate(k_total, grad_logits, queries_out)

                    q_total = accumulate(load_sums(sums, row, T, first > 0, D, OUT), tl.trans(grad_logits), keys_out)
                    store_tiles(sums, row, T, T, D, q_total, D, OUT, UNIT)
            store_tiles(
                head_of(grad_v, new_b, new_t, new_h, b, 0, g, UNIT), column, S, keys, new_t, v_total, D, OUT, UNIT
            )
            store_tiles(
                head_of(grad_k, new_b, new_t, new_h, b, 0, g, UNIT), column, S, keys, new_t, scaled(k_total, factor), D, OUT, UNIT
            )
            tl.debug_barrier()  # the next tile loads the sums of this one
        for member in tl.range(group):
            grad_q_head = head_of(grad_q, out_b, out_t, out_h, b, 0, g * group + member, UNIT)
            for at in tl.range(0, T, BLOCK_M):
                row = at + tl.arange(0, BLOCK_M)
                q_total = load_sums(scratch + member * T * D, row, T, True, D, OUT)
                store_tiles(grad_q_head, row, T, T, out_t, scaled(q_total, factor), D, OUT, UNIT)
