"""code_entropy: what it computes, its schema and fake."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_number
from mmgen_kernels.vq import reference
from mmgen_kernels.vq.ops.checks import FAMILY, check_lookup

TRITON = "mmgen_kernels.vq.triton_kernels.entropy"


class CodeEntropy(NamedTuple):
    """What `code_entropy` returns: fp32, or fp64 where either input is."""

    sample_entropy: Tensor  # (...), 0 where masked
    mean_entropy: Tensor  # () or (H,)


def code_entropy(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 1.0,
    metric: str = "l2",
    eps: float = 0.0,
    mask: Tensor | None = None,
) -> CodeEntropy:
    """Entropies of the soft assignment of rows to codes, without ever holding an N x K matrix, forward or backward.

    With scores ``s[n, k] = -|x[n] - c[k]|^2`` (metric "l2"), ``x[n] . c[k]`` ("dot"), or that divided by ``|x[n]| |c[k]|``
    ("cosine"; a zero vector scores 0), ``p[n] = softmax_k(s[n] / temperature)`` and M valid rows,
    ``sample_entropy[n] = -sum_k p[n, k] log p[n, k]``, ``q[k] = sum_n p[n, k] / M`` and
    ``mean_entropy = -sum_k q[k] log(q[k] + eps)``, where 0 log 0 = 0.

    The usual regulariser is ``sample_entropy.mean() - mean_entropy``: rows choose one code, and all codes are chosen. (With a
    mask the mean is over the valid rows: ``sample_entropy.sum() / mask.sum()``.) Differentiable once, in x and codebook, from
    both results. Sums run in fixed order: the same bits in every run and on any number of threads.

    Args:
        x: (..., D), or (H, ..., D) for H heads; fp64, fp32, bf16 or fp16; any strides.
        codebook: (K, D), or (H, K, D), one codebook per head; same device; its dtype may differ from x's. 1 <= K < 2^31.
        temperature: positive and finite.
        metric: "l2", "cosine" or "dot".
        eps: not negative and finite; LlamaGen and IBQ use 1e-5, in the second entropy alone as here.
        mask: (...) bool, True = valid; an invalid row has entropy 0, gradient 0 and no share in the mean.

    Returns:
        CodeEntropy. Without any valid row ``mean_entropy`` is 0.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values of tensors never raise.

    NaN: a valid row that is not finite, or whose scores over the temperature overflow fp32, has a NaN ``sample_entropy`` and
    makes ``mean_entropy`` NaN; a code that is not finite does so to all rows. Gradients follow.

    Source: Yu et al., Language Model Beats Diffusion: Tokenizer is Key to Visual Generation (MAGVIT-v2), 2023, eq. 5; Sun et al.,
    Autoregressive Model Beats Diffusion (LlamaGen), 2024; Shi et al., Taming Scalable Visual Tokenizer (IBQ), 2024.
    """
    check_lookup(x, codebook, mask, metric, "exact")
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    check_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    implementation = backends.choose(CODE_ENTROPY, FAMILY, x.device.type)
    return CodeEntropy(*CODE_ENTROPY(implementation, x, codebook, mask, float(temperature), metric, float(eps))[:2])


# -- registration -----------------------------------------------------------------------------------------------------


def code_entropy_fake(x, codebook, mask, temperature, metric, eps):
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    return (
        x.new_empty(x.shape[:-1], dtype=wide),
        x.new_empty(codebook.shape[:-2], dtype=wide),
        x.new_empty((*x.shape[:-1], 3), dtype=torch.float64),
        x.new_empty(codebook.shape[:-1], dtype=wide),
    )


def code_entropy_backward_fake(grad_sample_entropy, grad_mean_entropy, x, codebook, *options: Any):
    need_grad_x, need_grad_codebook = options[-2:]
    return (
        x.new_empty(x.shape if need_grad_x else (0,)),
        codebook.new_empty(codebook.shape if need_grad_codebook else (0,)),
    )


def code_entropy_vmap(call, info, in_dims, x, codebook, mask, temperature, metric, eps):
    """A sample has a mean of its own, so that samples are heads, also where they share a codebook."""
    batch = info.batch_size
    x, codebook, mask = (
        t if t is None else t.movedim(d, 0) if d is not None else t.expand(batch, *t.shape)
        for t, d in zip((x, codebook, mask), in_dims[:3], strict=True)
    )
    results_of = (x.shape[:-1], codebook.shape[:-2], (*x.shape[:-1], 3), codebook.shape[:-1])
    if codebook.dim() == 4:  # (B, H, K, D)
        x, codebook = x.flatten(0, 1), codebook.flatten(0, 1)
        mask = None if mask is None else mask.flatten(0, 1)
    results = call(x, codebook, mask, temperature, metric, eps)
    return tuple(r.view(shape) for r, shape in zip(results, results_of, strict=True)), (0,) * 4


CODE_ENTROPY = library.define(
    # softmax_terms (..., 3): see reference/entropy.py; of scores less what those of a row have in common
    "code_entropy(Tensor x, Tensor codebook, Tensor? mask, float temperature, str metric, float eps)"
    " -> (Tensor sample_entropy, Tensor mean_entropy, Tensor softmax_terms, Tensor mean_probability)",
    reference=reference.code_entropy,
    fake=code_entropy_fake,
    backward="code_entropy_backward(Tensor? grad_sample_entropy, Tensor? grad_mean_entropy, Tensor x, Tensor codebook,"
    " Tensor? mask, Tensor softmax_terms, Tensor mean_probability, float temperature, str metric, float eps,"
    " bool need_grad_x, bool need_grad_codebook) -> (Tensor grad_x, Tensor grad_codebook)",
    backward_reference=reference.code_entropy_backward,
    backward_fake=code_entropy_backward_fake,
    launchers={"triton": (f"{TRITON}:code_entropy", f"{TRITON}:code_entropy_backward")},
    vmap=code_entropy_vmap,
)
