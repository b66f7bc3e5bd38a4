"""The public functions of the family: what they compute, their schemas and fakes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.attn import reference
from mmgen_kernels.attn.checks import FAMILY, as_bias, check_cu_seqlens, check_key_lengths, check_qkv, check_scale


class AttentionOutput(NamedTuple):
    """What `attention` returns with return_lse."""

    out: Tensor  # q's shape
    lse: Tensor  # (B, H, T), packed (H, N); fp32, fp64 for fp64 q


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Any:
    """Scaled dot product attention without the (T, S) matrix in memory.

    ``out_i = sum_j p_ij v_j`` with ``p_ij = exp(l_ij - lse_i)``, ``l_ij = scale q_i k_j + bias_ij`` and
    ``lse_i = log sum_j exp(l_ij)`` over the keys j that query i sees, for each sample and head.

    Args:
        q: (B, T, H, D), fp64, fp32, bf16 or fp16; D a multiple of 8 up to 256. Strides are free but for the last: views of a packed
            projection are read in place. With cu_seqlens_q: (N, H, D), the sequences one after the other.
        k, v: (B, S, G, D), q's dtype; G divides H, and H / G heads of q read one head of k and v. Packed: (M, G, D).
        causal: query i sees the keys j <= i, as in torch's is_causal, for T != S too; packed: within each sequence.
        scale: 1 / sqrt(D) if None.
        bias: added to the logits, of any shape that broadcasts to (B, H, T, S) and any float dtype; -inf masks. It may want a
            gradient, which is summed over the sizes that were broadcast, in fixed order.
        key_lengths: int32 or int64 (B,): sample b sees its first key_lengths[b] keys; clamped to 0..S.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (C + 1,), not decreasing: sequence c has the queries cu_seqlens_q[c] to
            cu_seqlens_q[c + 1] and likewise its keys. They are never read by the host. Queries in no sequence give 0.
        deterministic: False also admits kernels whose backward adds in an order that varies from run to run.
        return_lse: returns (out, lse); lse is differentiable too.

    Returns:
        out, of q's shape and dtype; or AttentionOutput(out, lse) with lse (B, H, T), packed (H, N), natural logarithm.
        A query that sees no key gives out 0 and lse -inf, and its gradients are 0.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    Under autocast q, k and v are cast as torch's scaled_dot_product_attention casts them; bias is not, as it is added in fp32.

    NaN: a NaN or Inf in a query spoils that query's row; one in k or v spoils the rows that see it, and may spoil rows that see it
    masked by `causal` or by a bias of -inf. Keys beyond key_lengths are not read, nor are other sequences but by the reference,
    which multiplies a packed batch as a whole.

    Source: Dao et al. 2022, FlashAttention; Milakov and Gimelshein 2018 for the running softmax.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    kind = q.device.type if isinstance(q, Tensor) else "meta"
    if kind != "meta" and torch.is_autocast_enabled(kind):  # meta has no autocast to ask for
        q, k, v = (cast(t, torch.get_autocast_dtype(kind)) for t in (q, k, v))
    check_qkv(q, k, v, packed)
    check_key_lengths(key_lengths, q, packed)
    bias = as_bias(bias, q, k, packed)
    scale = check_scale(scale, q.shape[-1])
    if packed:
        check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    implementation = backends.choose(ATTENTION, FAMILY, kind)
    out, lse = ATTENTION(implementation, q, k, v, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, causal, scale, deterministic)
    if packed:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return AttentionOutput(out, lse.to(reference.wide_dtype(q))) if return_lse else out


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What is no float is left to the checks."""
    eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


# -- registration -----------------------------------------------------------------------------------------------------


def attention_fake(q, k, v, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, causal, scale, deterministic):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=reference.lse_dtype(q))


def attention_backward_fake(
    grad_out, grad_lse, q, k, v, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, out, lse, causal, scale, deterministic, *needs
):
    return tuple(
        q.new_empty(of.shape, dtype=of.dtype) if need and of is not None else q.new_empty(0)
        for of, need in zip((q, k, v, bias), needs, strict=True)
    )


# Of gradients that nobody needs, an empty tensor stands in the results.
ATTENTION = library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " bool causal, float scale, bool deterministic) -> (Tensor out, Tensor lse)",
    reference=reference.attention,
    fake=attention_fake,
    backward="attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias,"
    " Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor out, Tensor lse, bool causal, float scale,"
    " bool deterministic, bool need_grad_q, bool need_grad_k, bool need_grad_v, bool need_grad_bias)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    backward_reference=reference.attention_backward,
    backward_fake=attention_backward_fake,
    launchers={
        "triton": ("mmgen_kernels.attn.triton_kernels:attention", "mmgen_kernels.attn.triton_kernels:attention_backward"),
        "torch": ("mmgen_kernels.attn.torch_kernels:attention", "mmgen_kernels.attn.torch_kernels:attention_backward"),
    },
)
