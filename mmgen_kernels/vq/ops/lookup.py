"""nearest_code and vector_quantize: what they compute, their schemas and fakes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_number
from mmgen_kernels.vq import reference
from mmgen_kernels.vq.ops.checks import FAMILY, check_gradient, check_lookup

LAUNCHERS = {"cuda": "mmgen_kernels.vq.cuda", "triton": "mmgen_kernels.vq.triton_kernels"}


class VQOutput(NamedTuple):
    """What `vector_quantize` returns."""

    quantized: Tensor  # (..., D), the dtype that x and codebook promote to
    indices: Tensor  # (...), int64; -1 where masked
    loss: Tensor  # (), codebook_loss + beta * commitment_loss; fp32, or fp64 for fp64 input
    commitment_loss: Tensor  # ()
    codebook_loss: Tensor  # ()


def nearest_code(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", precision: str = "exact", mask: Tensor | None = None
) -> Tensor:
    """Index of the nearest code of each row, without ever holding an N x K matrix.

    ``index[n] = argmin_k sum_d (x[n, d] - codebook[k, d])^2`` (metric "l2"), ``argmax_k sum_d x[n, d] codebook[k, d]``
    ("dot"), or that divided by ``|codebook[k]|`` ("cosine"; a zero code scores 0).

    With ``precision="exact"`` the index is the one that the formula gives when it is evaluated in fp64, d ascending, a rounding
    after every multiplication and every addition, and the lowest index on equal values: the same from every implementation,
    whatever the batch around the row. With "fast" it is the lowest index within the rounding of one pass in
    fp32, or in what the hardware multiplies faster: bf16 or 16-bit integers (docs/vq.md).

    Args:
        x: (..., D), or (H, ..., D) for H heads; fp64, fp32, bf16 or fp16; any strides.
        codebook: (K, D), or (H, K, D), one codebook per head; same device; its dtype may differ from x's. 1 <= K < 2^31.
        metric: "l2", "cosine" or "dot".
        precision: "exact" or "fast".
        mask: (...) bool, True = valid; an invalid row gets index -1 and costs nothing.

    Returns:
        int64 (...). Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a NaN never wins, nor does a distance that is not below +inf; where no code wins, the index is 0. So a NaN row gives 0.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017, eq. 1-2. The bound behind "exact": docs/vq.md.
    """
    check_lookup(x, codebook, mask, metric, precision)
    return NEAREST_CODE(backends.choose(NEAREST_CODE, FAMILY, x.device.type), x, codebook, mask, metric, precision)


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    legacy_beta: bool = False,
    gradient: str = "straight_through",
    metric: str = "l2",
    precision: str = "exact",
    mask: Tensor | None = None,
) -> VQOutput:
    """Vector quantization as one differentiable operator: lookup, gather, both losses, and the gradient past the argmin.

    ``quantized = codebook[nearest_code(x, codebook)]``; with M valid rows
    ``commitment_loss = sum |x - sg(c)|^2 / (M D)``, ``codebook_loss = sum |sg(x) - c|^2 / (M D)`` and
    ``loss = codebook_loss + beta * commitment_loss`` (``legacy_beta``: beta on the other term, as in taming-transformers).

    Gradients: of ``quantized`` to x, straight through (``dx = dq``) or by the rotation trick (``dx = s R^T dq``, where
    ``c = s R x``); of the losses to x and to the codebook, the latter by sums in row order, the same bits in every run.
    Differentiable once. x and ``quantized`` are all that is kept for the backward, so that the codebook may be written in
    place (EMA) before it.

    Args:
        x, codebook, metric, precision, mask: as in `nearest_code`. The metric chooses the index only: normalise x and codebook
            first if losses on the sphere are meant.
        beta: weight of the commitment loss.
        legacy_beta: puts beta on the codebook loss instead.
        gradient: "straight_through" or "rotation".

    Returns:
        VQOutput. ``quantized`` has the dtype to which x and codebook promote and holds the codes bit for bit; losses are fp32
        (fp64 for fp64). A masked row gives index -1, quantized 0, gradient 0 and no share in any mean. Without any valid row
        the losses are 0.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a row whose squared distance to its code is not finite (NaN or Inf in the row) gives NaN quantized and a loss that is
    not finite.

    Source: van den Oord et al. 2017, eq. 3; Fifty et al., Restructuring Vector Quantization with the Rotation Trick, 2024.
    """
    check_lookup(x, codebook, mask, metric, precision)
    check_gradient(gradient)
    check_number("beta", beta)
    if not isinstance(legacy_beta, bool):  # a tensor would become a bool by a host sync
        raise TypeError(f"legacy_beta must be a bool, got {type(legacy_beta).__name__}")
    implementation = backends.choose(VECTOR_QUANTIZE, FAMILY, x.device.type)
    return VQOutput(
        *VECTOR_QUANTIZE(implementation, x, codebook, mask, float(beta), legacy_beta, gradient, metric, precision)
    )


# -- registration -----------------------------------------------------------------------------------------------------


def nearest_code_fake(x, codebook, mask, metric, precision):
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def nearest_code_vmap(call, info, in_dims, x, codebook, mask, metric, precision):
    """A batch of rows is just more rows; a batch of codebooks is heads."""
    x_dim, codebook_dim, mask_dim = in_dims[:3]
    batch = info.batch_size
    x = x.movedim(x_dim, 0) if x_dim is not None else x.expand(batch, *x.shape)
    if mask is not None:
        mask = mask.movedim(mask_dim, 0) if mask_dim is not None else mask.expand(batch, *mask.shape)
    leading = x.shape[:-1]
    if codebook_dim is None and codebook.dim() == 3:  # (B, H, ..., D) -> heads in front
        x, mask = x.movedim(0, 1), None if mask is None else mask.movedim(0, 1)
        return call(x, codebook, mask, metric, precision).movedim(0, 1), 0
    if codebook_dim is not None:
        codebook = codebook.movedim(codebook_dim, 0)
        if codebook.dim() == 4:  # (B, H, K, D)
            codebook = codebook.flatten(0, 1)
            x, mask = x.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    return call(x, codebook, mask, metric, precision).view(leading), 0


def vector_quantize_fake(x, codebook, mask, beta, legacy_beta, gradient, metric, precision):
    dtype = torch.promote_types(x.dtype, codebook.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    losses = (x.new_empty((), dtype=wide) for _ in range(3))
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.int64), *losses


def vector_quantize_backward_fake(
    grad_quantized, grad_loss, grad_commitment_loss, grad_codebook_loss, x, quantized, indices, codebook_shape, *options: Any
):
    need_grad_x, need_grad_codebook = options[-2:]
    return (
        x.new_empty(x.shape if need_grad_x else (0,)),
        quantized.new_empty(codebook_shape if need_grad_codebook else (0,)),
    )


NEAREST_CODE = library.define(
    "nearest_code(Tensor x, Tensor codebook, Tensor? mask, str metric, str precision) -> Tensor indices",
    reference=reference.nearest_code,
    fake=nearest_code_fake,
    launchers={name: f"{module}:nearest_code" for name, module in LAUNCHERS.items()},
    vmap=nearest_code_vmap,
)

VECTOR_QUANTIZE = library.define(
    "vector_quantize(Tensor x, Tensor codebook, Tensor? mask, float beta, bool legacy_beta, str gradient, str metric,"
    " str precision) -> (Tensor quantized, Tensor indices, Tensor loss, Tensor commitment_loss, Tensor codebook_loss)",
    reference=reference.vector_quantize,
    fake=vector_quantize_fake,
    backward="vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_loss, Tensor? grad_commitment_loss,"
    " Tensor? grad_codebook_loss, Tensor x, Tensor quantized, Tensor indices, SymInt[] codebook_shape, float beta,"
    " bool legacy_beta, str gradient, bool need_grad_x, bool need_grad_codebook) -> (Tensor grad_x, Tensor grad_codebook)",
    backward_reference=reference.vector_quantize_backward,
    backward_fake=vector_quantize_backward_fake,
    launchers={
        name: (f"{module}:vector_quantize", "mmgen_kernels.vq.reference:vector_quantize_backward")
        for name, module in LAUNCHERS.items()
    },
)
