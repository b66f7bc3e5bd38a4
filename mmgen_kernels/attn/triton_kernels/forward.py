"""The operator forward: one kernel, one launch; the logits are never in memory."""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples of tiles grow)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.attn import reference
from mmgen_kernels.attn.triton_kernels.configuration import chip, forward_configuration
from mmgen_kernels.attn.triton_kernels.descriptors import NO_BOXES, boxes_of, refuses, way_of
from mmgen_kernels.attn.triton_kernels.tiles import (
    LN_2,
    accumulate,
    bias_arguments,
    contiguous,
    contract,
    dense_rows,
    exponential,
    head_of,
    head_tiles,
    load_bias,
    load_block,
    locate,
    located,
    number_of_tiles,
    on,
    scaled,
    sequences,
    store_tiles,
    unit_of,
    unit_of_logits,
    visible_keys,
    zero_tiles,
)


@triton.jit
def attend(
    shift, divisor, totals, queries, at, first, rows, keys,
    k, k_boxes, k_t, v, v_boxes, v_t, place, bias, bias_t, bias_s, scale,
    CAUSAL: tl.constexpr, PRESCALED: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, D: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A step of the running softmax, BLOCK_N keys: shift is the largest logit so far, as it was rounded when it was subtracted,
    divisor and totals are sums of exp(logit - shift). BOUNDED: `keys` may end before their tensor does."""
    row = first + tl.arange(0, BLOCK_M)
    column = at + tl.arange(0, BLOCK_N)
    logits = contract(queries, load_block(k, k_boxes, place, at, keys, k_t, D, IN, UNIT, BOUNDED, BLOCK_N))  # (M, N)
    if PRESCALED:
        logits *= scale
    if bias is not None:
        logits += load_bias(bias, row[:, None], rows, column[None, :], keys, bias_t, bias_s, k)
    if MASKED:
        seen = (column < keys)[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= row[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    largest = tl.max(logits, 1) if PRESCALED else tl.max(logits, 1) * scale
    largest = tl.maximum(shift, largest)
    subtract = tl.where(largest == float("-inf"), 0.0, largest)  # no key yet
    # where it scales, one fused multiply-add: only `subtract` is rounded
    difference = logits - subtract[:, None] if PRESCALED else logits * scale - subtract[:, None]
    weights = exponential(difference, k)  # (M, N)
    shrink = exponential(shift - subtract, k)
    divisor = divisor * shrink + tl.sum(weights, 1)
    values = load_block(v, v_boxes, place, at, keys, v_t, D, OUT, UNIT, BOUNDED, BLOCK_N)
    totals = accumulate(scaled(totals, shrink[:, None]), weights.to(v.dtype.element_ty), values)
    return largest, divisor, totals


@triton.jit
def boxes_of_tiles(box, box_2):
    if box is None:
        boxes = None
    elif box_2 is None:
        boxes = (box,)
    else:
        boxes = (box, box_2)
    return boxes


@triton.jit
def divided(tiles, divisor):
    quotients = ()
    for i in tl.static_range(len(tiles)):
        quotients += (tl.div_rn(tiles[i], tl.broadcast_to(divisor[:, None], tiles[i].shape)),)
    return quotients


@triton.jit
def finish(shift, divisor, totals, out, out_t, lse, row, rows, D: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr):
    """Writes what the last key has left; out and lse are at row 0 of the sequence."""
    empty = divisor == 0.0
    divisor = tl.where(empty, 1.0, divisor)
    if out.dtype.element_ty == tl.float32:
        logarithm = shift.to(tl.float64) + tl.log(divisor.to(tl.float64))
        outs = divided(totals, divisor)
    else:  # a rounding more in fp32
        logarithm = (shift + tl.log2(divisor)) * LN_2
        outs = scaled(totals, (1.0 / divisor)[:, None])
    store_tiles(out, row, rows, rows, out_t, outs, D, OUT, UNIT)
    tl.store(lse + row, tl.where(empty, float("-inf"), logarithm), mask=row < rows)


INTEGERS = [
    "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h", "out_b", "out_t", "out_h", "bias_b", "bias_h", "bias_t",
    "T", "S", "H", "group", "C", "tiles",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def attention_forward(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, bias, bias_b, bias_h, bias_t, bias_s,
    key_lengths, cu_seqlens_q, cu_seqlens_k, out, out_b, out_t, out_h, lse, T, S, H, group, C, tiles, scale,
    q_box, q_box_2, k_box, k_box_2, v_box, v_box_2,
    CAUSAL: tl.constexpr, PRESCALED: tl.constexpr, D: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. Not PRESCALED: scale is positive and multiplied in the exponent. Boxes: descriptors of the
    first and the second tile, or None."""
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = head // H, head % H
    start, rows, start_k, keys, first = locate(tile, cu_seqlens_q, cu_seqlens_k, C, T, S, BLOCK_M)
    if cu_seqlens_q is not None:  # noqa: SIM102, one condition is of the compiler. Specialised warps do not compile with a way out
        if first >= rows:
            return
    keys = visible_keys(key_lengths, b, keys)
    q = head_of(q, q_b, q_t, q_h, b, start, h, UNIT)
    k = head_of(k, k_b, k_t, k_h, b, start_k, h // group, UNIT)
    v = head_of(v, v_b, v_t, v_h, b, start_k, h // group, UNIT)
    out = head_of(out, out_b, out_t, out_h, b, start, h, UNIT)
    if bias is not None:
        bias += tl.cast(b, tl.int64) * bias_b + tl.cast(h, tl.int64) * bias_h

    q_boxes = boxes_of_tiles(q_box, q_box_2)
    k_boxes = boxes_of_tiles(k_box, k_box_2)
    v_boxes = boxes_of_tiles(v_box, v_box_2)
    place = (b, h // group, start_k)
    queries = load_block(q, q_boxes, (b, h, start), first, rows, q_t, D, IN, UNIT, q_boxes is None, BLOCK_M)
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    divisor = tl.zeros([BLOCK_M], tl.float32)
    totals = zero_tiles(BLOCK_M, OUT)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_M)
    whole = end  # keys before it are in whole tiles that need no mask
    if not SPECIALIZED:
        if CAUSAL:
            whole = tl.minimum(keys, first + 1)
        whole = whole // BLOCK_N * BLOCK_N
    for at in tl.range(0, whole, BLOCK_N, warp_specialize=SPECIALIZED):
        shift, divisor, totals = attend(
            shift, divisor, totals, queries, at, first, rows, keys, k, k_boxes, k_t, v, v_boxes, v_t, place,
            bias, bias_t, bias_s, scale, CAUSAL, PRESCALED, SPECIALIZED, False, D, IN, OUT, UNIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if not SPECIALIZED:
        # Once, or along the diagonal. Prefetching took 240 instructions more at D = 72 for sm_90, and kept more addresses alive. At
        # D = 160 for sm_80 it spills less: 40 bytes for 112
        for at in tl.range(whole, end, BLOCK_N, num_stages=1 if D <= 128 else 2, disable_licm=D <= 128):
            shift, divisor, totals = attend(
                shift, divisor, totals, queries, at, first, rows, keys, k, k_boxes, k_t, v, v_boxes, v_t, place,
                bias, bias_t, bias_s, scale, CAUSAL, PRESCALED, True, True, D, IN, OUT, UNIT, BLOCK_M, BLOCK_N,
            )  # fmt: skip

    row = first + tl.arange(0, BLOCK_M)
    finish(shift, divisor, totals, out, out_t, lse + tl.cast(head, tl.int64) * T + start, row, rows, D, OUT, UNIT)


# -- launcher ---------------------------------------------------------------------------------------------------------


def is_prescaled(bias: Tensor | None, scale: float) -> bool:
    """Whether logits are scaled before their maximum is taken: a bias is added to scaled ones, and a scale that is not positive
    would take the smallest for the largest."""
    return bias is not None or not scale > 0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    if q.dtype == torch.float64:
        return reference.attention(q, k, v, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, causal, scale, deterministic)
    B, T, H, D = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, T), dtype=reference.lse_dtype(q))
    if out.numel() == 0:
        return out, lse
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    unit, head, at = unit_of(q, k, v, out), head_tiles(D), chip(q.device)
    way = way_of(q, k, v, head, at, bias, key_lengths, cu_seqlens_q)
    c = forward_configuration(q.dtype, D, at, bias is not None, way != "pointers")
    boxes = NO_BOXES
    if way != "pointers":
        boxes = (*boxes_of(q, head["IN"], c.block_m), *boxes_of(k, head["IN"], c.block_n), *boxes_of(v, head["OUT"], c.block_n))
    tiles = number_of_tiles(T, c.block_m, cu_seqlens_q)
    grid = (B * H * tiles,)
    arguments = (
        *located(q), *located(k), *located(v), *bias_arguments(bias),
        key_lengths, contiguous(cu_seqlens_q), contiguous(cu_seqlens_k), *located(out), lse,
        T, k.shape[1], H, H // k.shape[2], sequences(cu_seqlens_q), tiles, scale * unit_of_logits(q.dtype), *boxes,
    )  # fmt: skip
    specialized = way == "warp_specialized"
    options = {"CAUSAL": causal, "PRESCALED": is_prescaled(bias, scale), "SPECIALIZED": specialized, "UNIT": unit}
    options |= {**head, **c.constants(), **c.options()}
    with on(q):
        if specialized and refuses(attention_forward, grid, q.device, arguments, options):
            options["SPECIALIZED"] = False
        attention_forward[grid](*arguments, **options)
    return out, lse
