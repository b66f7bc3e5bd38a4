"""The operator backward. No kernel adds to what another program has written, and each walks in a fixed order: the same bits in
every run, and for a sample whatever is around it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmgen_kernels.attn import reference
from mmgen_kernels.attn.triton_kernels.backward_bias import attention_backward_bias
from mmgen_kernels.attn.triton_kernels.backward_keys import attention_backward_keys
from mmgen_kernels.attn.triton_kernels.backward_queries import attention_backward_queries
from mmgen_kernels.attn.triton_kernels.backward_short import attention_backward_short
from mmgen_kernels.attn.triton_kernels.configuration import (
    bias_configuration,
    chip,
    is_short,
    keys_configuration,
    queries_configuration,
    resident_programs,
    short_configuration,
)
from mmgen_kernels.attn.triton_kernels.tiles import (
    bias_arguments,
    contiguous,
    dense_rows,
    dense_strides,
    head_tiles,
    located,
    number_of_tiles,
    on,
    sequences,
    unit_of,
    unit_of_logits,
)


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    deterministic: bool,
    need_grad_q: bool,
    need_grad_k: bool,
    need_grad_v: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (need_grad_q, need_grad_k, need_grad_v, need_grad_bias and bias is not None)
    if q.dtype == torch.float64:
        return reference.attention_backward(
            grad_out, grad_lse, q, k, v, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, out, lse, causal, scale, deterministic,
            *needs,
        )  # fmt: skip
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    empty = B * T == 0 or S == 0  # nobody attends
    new = torch.zeros if empty else torch.empty
    grad_q, grad_k, grad_v, grad_bias = (
        new(t.shape if need else 0, dtype=t.dtype, device=t.device) if t is not None else q.new_empty(0)
        for t, need in zip((q, k, v, bias), needs, strict=True)
    )
    if empty:
        return grad_q, grad_k, grad_v, grad_bias

    grad = torch.zeros_like(out) if grad_out is None else dense_rows(grad_out)
    q, k, v, out = dense_rows(q), dense_rows(k), dense_rows(v), out.contiguous()
    grad_lse, bounds = contiguous(grad_lse), (contiguous(cu_seqlens_q), contiguous(cu_seqlens_k))
    delta = torch.empty_like(lse, dtype=torch.float32)  # (B, H, T)
    unit = unit_of(q, k, v, grad, out)
    at = q.dtype, D, chip(q.device)
    inputs = (*located(q), *located(k), *located(v), *bias_arguments(bias))
    upstream = located(grad)
    new_q, new_k = dense_strides(q), dense_strides(k)
    floats = (scale * unit_of_logits(q.dtype), scale)
    constants = {"CAUSAL": causal, "UNIT": unit, **head_tiles(D)}
    with on(q):
        c = short_configuration(*at)
        if c is not None and cu_seqlens_q is None and is_short(T, S) and all(needs[:3]):
            programs = min(B * G, resident_programs(q.device))
            scratch = torch.empty((programs, H // G, T, D), dtype=torch.float32, device=q.device)
            attention_backward_short[(programs,)](
                *inputs, key_lengths, *upstream, lse, grad_lse, delta, out, grad_q, *new_q, grad_k, grad_v, *new_k, scratch,
                T, S, H, H // G, B * G, *floats, **constants, **c.constants(), **c.options(),
            )  # fmt: skip
        else:
            c = queries_configuration(*at, bias is not None, cu_seqlens_q is not None)
            tiles = number_of_tiles(T, c.block_m, cu_seqlens_q)
            attention_backward_queries[(B * H * tiles,)](
                *inputs, key_lengths, *bounds, *upstream, lse, grad_lse, delta, out, grad_q if needs[0] else None, *new_q,
                T, S, H, H // G, sequences(cu_seqlens_q), tiles, *floats, **constants, **c.constants(), **c.options(),
            )  # fmt: skip
            if needs[1] or needs[2]:
                c = keys_configuration(*at)
                tiles = number_of_tiles(S, c.block_n, cu_seqlens_k)
                attention_backward_keys[(B * G * tiles,)](
                    *inputs, key_lengths, *bounds, *upstream, lse, delta, grad_k if needs[1] else None,
                    grad_v if needs[2] else None, *new_k, T, S, H, H // G, sequences(cu_seqlens_q), tiles, *floats,
                    **constants, **c.constants(), **c.options(),
                )  # fmt: skip
        if needs[3] and bias is not None:
            c = bias_configuration(*at)
            del constants["OUT"]
            samples, heads, rows, columns = bias.shape
            tiles_m, tiles_n = triton.cdiv(rows, c.block_m), triton.cdiv(columns, c.block_n)
            attention_backward_bias[(samples * heads * tiles_m * tiles_n,)](
                *inputs, key_lengths, *upstream, lse, delta, grad_bias, T, S, H, H // G, heads, tiles_m, tiles_n,
                B // samples, H // heads, floats[0], SUM_T=rows == 1, SUM_S=columns == 1,
                **constants, **c.constants(), **c.options(),
            )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_bias
