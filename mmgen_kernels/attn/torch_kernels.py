"""Stock kernels of torch behind the family's operator: what they serve, and what goes to the reference instead.

torch's CPU kernel adds in a fixed order, but it cannot be called as it is (all seen with torch 2.13):
  - without queries or without keys it divides by zero, which ends the process;
  - a query whose keys are all masked by an additive mask gets lse 0, not -inf;
  - a mask of another dtype beside fp64 queries is read as fp64, so that results are wrong without a word;
  - keys masked as padding are read nevertheless, and 0 * NaN is NaN.
So samples with key lengths and sequences of a packed batch are called one by one on what they see, and the rest is put right here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmgen_kernels.attn import reference

aten = torch.ops.aten


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
    bounds = (key_lengths, cu_seqlens_q, cu_seqlens_k)
    if q.device.type == "cpu":
        if key_lengths is None and cu_seqlens_q is None:
            return on_cpu(q, k, v, bias, causal, scale)
        out, lse = nothing_seen(q)
        for b, queries, keys in parts(q, k, *bounds):
            own = on_cpu(q[b, queries], k[b, keys], v[b, keys], bias_of(bias, b, keys), causal, scale)
            out[b, queries], lse[b, :, queries] = own
        return out, lse
    if flash_serves(q, k, bias, *bounds, causal):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*by_head(q, k, v), is_causal=causal, scale=scale)
        return out.transpose(1, 2), lse
    return reference.attention(q, k, v, bias, *bounds, causal, scale, deterministic)


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
    *needs: bool,
) -> tuple[Tensor, ...]:
    bounds = (key_lengths, cu_seqlens_q, cu_seqlens_k)
    stock = grad_lse is None and not needs[3]  # stock kernels know neither of the other gradients
    if grad_out is not None and stock and q.device.type == "cpu":
        lse = lse.to(reference.wide_dtype(q)).masked_fill(lse == -torch.inf, 0)  # a row without keys: exp(-inf - 0) is 0
        if key_lengths is None and cu_seqlens_q is None:
            grads = on_cpu_backward(grad_out, q, k, v, out, lse, bias, causal, scale)
        else:
            grads = tuple(t.new_zeros(t.shape) for t in (q, k, v))
            for b, queries, keys in parts(q, k, *bounds):
                seen = (grad_out[b, queries], q[b, queries], k[b, keys], v[b, keys], out[b, queries], lse[b, :, queries])
                own = on_cpu_backward(*seen, bias_of(bias, b, keys), causal, scale)
                for grad, at, value in zip(grads, (queries, keys, keys), own, strict=True):
                    grad[b, at] = value
    elif grad_out is not None and stock and flash_serves(q, k, bias, *bounds, causal):
        grads = flash_backward(grad_out, q, k, v, out, lse, causal, scale, deterministic)
    else:
        return reference.attention_backward(
            grad_out, grad_lse, q, k, v, bias, *bounds, out, lse, causal, scale, deterministic, *needs
        )
    return (*(grad if need else q.new_empty(0) for grad, need in zip(grads, needs, strict=False)), q.new_empty(0))


# -- on the CPU -------------------------------------------------------------------------------------------------------


def on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return nothing_seen(q)
    bias = as_mask(bias, q)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*by_head(q, k, v), 0.0, causal, attn_mask=bias, scale=scale)
    if bias is not None:
        lse = lse.masked_fill(blind(bias, q.shape[1], causal), -torch.inf)
    return out.transpose(1, 2), lse.to(reference.lse_dtype(q))


def on_cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    if q.numel() == 0 or k.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in (q, k, v))
    grad_out, out = by_head(grad_out, out)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, *by_head(q, k, v), out, lse, 0.0, causal, attn_mask=as_mask(bias, q), scale=scale
    )
    return tuple(grad.transpose(1, 2) for grad in grads)


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_zeros(q.shape), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=reference.lse_dtype(q))


def as_mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """In q's dtype or fp32, the two that the kernel reads as what they are."""
    return bias if bias is None or bias.dtype == q.dtype else bias.to(reference.wide_dtype(q))


def blind(bias: Tensor, queries: int, causal: bool) -> Tensor:
    """Which queries have -inf on every key that they may see: (1 or B, 1 or H, 1 or T)."""
    seen = bias != -torch.inf
    first = seen.to(torch.uint8).argmax(-1)  # the lowest, 0 where there is none
    last = torch.arange(queries) if causal else bias.shape[-1]
    return ~seen.any(-1) | (first > last)


def parts(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice, slice]]:
    """Samples, queries and keys of the pieces that see nothing of each other. Bounds are clamped."""
    T, S = q.shape[1], k.shape[1]
    if key_lengths is not None:
        for b, length in enumerate(key_lengths.tolist()):
            yield slice(b, b + 1), slice(0, T), slice(0, min(max(length, 0), S))
    elif cu_seqlens_q is not None and cu_seqlens_k is not None:
        bounds = zip(cu_seqlens_q.clamp(0, T).tolist(), cu_seqlens_k.clamp(0, S).tolist(), strict=True)
        for (q_begin, k_begin), (q_end, k_end) in itertools.pairwise(bounds):
            yield slice(0, 1), slice(q_begin, max(q_begin, q_end)), slice(k_begin, max(k_begin, k_end))


def bias_of(bias: Tensor | None, b: slice, keys: slice) -> Tensor | None:
    if bias is None:
        return None
    return bias[b if bias.shape[0] > 1 else slice(None), :, :, keys if bias.shape[3] > 1 else slice(None)]


def by_head(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


# -- on CUDA, where only the plain case is left to torch ----------------------------------------------------------------


def flash_serves(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
) -> bool:
    """Its causal mask begins at the last query, ours at the first: alike for T = S alone. fp32 has no flash kernel."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and bias is None
        and key_lengths is None
        and cu_seqlens_q is None
        and cu_seqlens_k is None
        and q.numel() > 0
        and k.numel() > 0
        and (not causal or q.shape[1] == k.shape[1])
    )


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, deterministic: bool
) -> tuple[Tensor, ...]:
    nothing_drawn = q.new_empty(2, dtype=torch.uint64)  # the state of a dropout that there is not
    with adding_in_order(deterministic):
        grads = aten._scaled_dot_product_flash_attention_backward(
            *by_head(grad_out, q, k, v, out), lse, None, None, q.shape[1], k.shape[1], 0.0, causal, nothing_drawn, nothing_drawn,
            scale=scale,
        )  # fmt: skip
    return tuple(grad.transpose(1, 2) for grad in grads)


@contextmanager
def adding_in_order(wanted: bool) -> Iterator[None]:
    """torch's flash backward adds dq in a fixed order under the global flag, and under warn_only it does not."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or before == (True, False):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
