"""joint_attention: what it computes, the operator's schema and fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.attn import reference
from mmgen_kernels.attn.checks import FAMILY, check_joint, check_scale
from mmgen_kernels.attn.ops import cast


def joint_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scale: float | None = None,
    key_lengths: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of two streams of tokens with each other, as text and image have it in MMDiT and FLUX, without joining them.

    ``out_1, out_2 = split(attention(cat(q_1, q_2), cat(k_1, k_2), cat(v_1, v_2)))``: every query sees the keys of both streams. No
    stream is copied: what `torch.cat` and `split` would move is read and written where it is.

    Args:
        queries: (q_1, q_2), (B, T_1, H, D) and (B, T_2, H, D), fp64, fp32, bf16 or fp16; D a multiple of 8 up to 256. Strides are
            free but for the last: views of packed projections are read in place.
        keys, values: (k_1, k_2) and (v_1, v_2), (B, S_1, G, D) and (B, S_2, G, D), the queries' dtype; G divides H, and H / G heads
            of queries read one head of keys and values.
        scale: 1 / sqrt(D) if None.
        key_lengths: (lengths_1, lengths_2), int32 or int64 (B,), or None for a stream that is seen whole: of sample b the first
            lengths_i[b] keys of stream i are seen; clamped to 0..S_i. A text that is padded at its end has them.

    Returns:
        (out_1, out_2), of the queries' shapes and dtype, contiguous. Differentiable once; gradients are the same from run to run. A
        query that sees no key gives 0, and its gradients are 0.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    Under autocast all are cast as torch's scaled_dot_product_attention casts.

    NaN: a NaN or Inf in a query spoils that query's row; one in a key or value spoils all rows of its sample and head. Keys beyond
        key_lengths are not read.

    Source: Esser et al. 2024, Scaling Rectified Flow Transformers (MMDiT), section 4; Dao et al. 2022, FlashAttention.
    """
    streams = [stream for pair in (queries, keys, values) for stream in pair] if are_pairs(queries, keys, values) else []
    device = next((t.device.type for t in streams if isinstance(t, Tensor)), "meta")
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast to ask for
        streams = [cast(t, torch.get_autocast_dtype(device)) for t in streams]
        queries, keys, values = streams[:2], streams[2:4], streams[4:]
    check_joint(queries, keys, values, key_lengths)
    scale = check_scale(scale, queries[0].shape[-1])
    by_stream = [t for stream in zip(queries, keys, values, strict=True) for t in stream]
    implementation = backends.choose(JOINT_ATTENTION, FAMILY, device)
    out_1, out_2, _ = JOINT_ATTENTION(implementation, *by_stream, *(key_lengths or (None, None)), scale)
    return out_1, out_2


def are_pairs(*arguments: Any) -> bool:
    return all(isinstance(a, (tuple, list)) and len(a) == 2 for a in arguments)


# -- registration -----------------------------------------------------------------------------------------------------


def joint_attention_fake(q_1, k_1, v_1, q_2, k_2, v_2, key_lengths_1, key_lengths_2, scale):
    B, T, H, _ = q_1.shape
    lse = q_1.new_empty((B, H, T + q_2.shape[1]), dtype=reference.lse_dtype(q_1))
    return q_1.new_empty(q_1.shape), q_2.new_empty(q_2.shape), lse


def joint_attention_backward_fake(
    grad_out_1, grad_out_2, q_1, k_1, v_1, q_2, k_2, v_2, key_lengths_1, key_lengths_2, out_1, out_2, lse, scale, *needs
):
    inputs = (q_1, k_1, v_1, q_2, k_2, v_2)
    return tuple(of.new_empty(of.shape if need else 0) for of, need in zip(inputs, needs, strict=True))


TENSORS = ("q_1", "k_1", "v_1", "q_2", "k_2", "v_2")
STREAMS = ", ".join(f"Tensor {name}" for name in TENSORS) + ", Tensor? key_lengths_1, Tensor? key_lengths_2"

# lse (B, H, T_1 + T_2) is for the backward. Of gradients that nobody needs, an empty tensor stands in the results.
JOINT_ATTENTION = library.define(
    f"joint_attention({STREAMS}, float scale) -> (Tensor out_1, Tensor out_2, Tensor lse)",
    reference=reference.joint_attention,
    fake=joint_attention_fake,
    backward=f"joint_attention_backward(Tensor? grad_out_1, Tensor? grad_out_2, {STREAMS}, Tensor out_1, Tensor out_2, Tensor lse,"
    f" float scale, {', '.join(f'bool need_grad_{name}' for name in TENSORS)})"
    f" -> ({', '.join(f'Tensor grad_{name}' for name in TENSORS)})",
    backward_reference=reference.joint_attention_backward,
    backward_fake=joint_attention_backward_fake,
    launchers={
        "triton": (
            "mmgen_kernels.attn.triton_kernels:joint_attention",
            "mmgen_kernels.attn.triton_kernels:joint_attention_backward",
        )
    },
)
