"""Gradient of the bias: a program has a tile of the bias's own shape and walks everything that it was broadcast to, in order."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import triton
import triton.language as tl

from mmgen_kernels.attn.triton_kernels.logits import grad_of_logits, load_exponent, weights_of
from mmgen_kernels.attn.triton_kernels.tiles import contract, head_of, load_tiles, visible_keys

INTEGERS = [
    "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h", "bias_b", "bias_h", "bias_t", "grad_b", "grad_t", "grad_h",
    "T", "S", "H", "group", "heads", "tiles_m", "tiles_n", "b_walk", "h_walk",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def attention_backward_bias(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, bias, bias_b, bias_h, bias_t, bias_s,
    key_lengths, grad, grad_b, grad_t, grad_h, lse, delta, grad_bias,
    T, S, H, group, heads, tiles_m, tiles_n, b_walk, h_walk, scale,
    SUM_T: tl.constexpr, SUM_S: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, IN: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program ((sample, head), tile of queries, tile of keys) of the bias, of which it has `heads` a sample. It walks b_walk
    samples and h_walk heads, and all queries where SUM_T, all keys where SUM_S."""
    tile_n, rest = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    tile_m, head = rest % tiles_m, rest // tiles_m
    row_first, column_first = tile_m * BLOCK_M, tile_n * BLOCK_N
    row_end = T if SUM_T else row_first + 1
    column_end = S if SUM_S else column_first + 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(head // heads, head // heads + b_walk):
        keys = visible_keys(key_lengths, b, S)
        for h in tl.range(head % heads, head % heads + h_walk):
            row_0 = tl.cast(b * H + h, tl.int64) * T
            q_head = head_of(q, q_b, q_t, q_h, b, 0, h, UNIT)
            k_head = head_of(k, k_b, k_t, k_h, b, 0, h // group, UNIT)
            v_head = head_of(v, v_b, v_t, v_h, b, 0, h // group, UNIT)
            grad_head = head_of(grad, grad_b, grad_t, grad_h, b, 0, h, UNIT)
            bias_head = bias + tl.cast(b, tl.int64) * bias_b + tl.cast(h, tl.int64) * bias_h
            for at_m in tl.range(row_first, row_end, BLOCK_M):
                row = at_m + tl.arange(0, BLOCK_M)
                queries = load_tiles(q_head, row, T, q_t, D, IN, UNIT, True)
                grads = load_tiles(grad_head, row, T, grad_t, D, IN, UNIT, True)
                exponent = load_exponent(lse + row_0, row, T, k)
                inner = tl.load(delta + row_0 + row, mask=row < T, other=0.0)
                for at_n in tl.range(column_first, column_end, BLOCK_N):
                    column = at_n + tl.arange(0, BLOCK_N)
                    k_tiles = load_tiles(k_head, column, keys, k_t, D, IN, UNIT, True)
                    weights = weights_of(
                        queries, k_tiles, exponent[:, None], row[:, None], T, column[None, :], keys, bias_head, bias_t, bias_s,
                        scale, k,
                    )  # fmt: skip
                    seen = (column < keys)[None, :]
                    if CAUSAL:
                        seen = seen & (column[None, :] <= row[:, None])
                    weights = tl.where(seen, weights, 0.0)
                    v_tiles = load_tiles(v_head, column, keys, v_t, D, IN, UNIT, True)
                    total += grad_of_logits(weights, contract(grads, v_tiles), inner[:, None], True)
    rows, columns = T, S  # of the bias
    row = row_first + tl.arange(0, BLOCK_M)
    column = column_first + tl.arange(0, BLOCK_N)
    if SUM_T:
        total = tl.sum(total, 0, keep_dims=True)
        row = tl.arange(0, 1)
        rows = 1
    if SUM_S:
        total = tl.sum(total, 1, keep_dims=True)
        column = tl.arange(0, 1)
        columns = 1
    at = (tl.cast(head, tl.int64) * rows + row[:, None]) * columns + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(grad_bias + at, total.to(grad_bias.dtype.element_ty), mask=mask)
