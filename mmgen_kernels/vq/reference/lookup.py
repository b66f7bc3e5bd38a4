"""nearest_code and vector_quantize in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmgen_kernels.vq.reference.codebook import code_statistics

SCORES_AT_ONCE = 1 << 21  # fp64 scores held at a time (16 MiB): never an N x K matrix


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str) -> Tensor:
    """Index of the nearest code, evaluated in fp64 with d ascending: the definition of `precision="exact"`, literally."""
    rows, codes, heads = with_heads(x, codebook)  # (H, N, D), (H, K, D)
    if metric == "cosine":
        norms = square_roots(squared_norms(codes))  # (H, K)
    indices = torch.zeros(rows.shape[:2], dtype=torch.int64, device=x.device)  # (H, N)
    step = max(1, SCORES_AT_ONCE // codes.shape[1])
    for h in range(heads):
        for start in range(0, rows.shape[1], step):
            r = rows[h, start : start + step].double()  # (n, D)
            c = codes[h].double()  # (K, D)
            total = torch.zeros(len(r), len(c), dtype=torch.float64, device=x.device)  # (n, K)
            for d in range(r.shape[1]):  # two roundings per term: a multiplication, then an addition
                if metric == "l2":
                    total += (r[:, d, None] - c[None, :, d]).square_()
                else:
                    total += r[:, d, None] * c[None, :, d]
            if metric == "cosine":
                total = torch.where(norms[h] == 0, 0.0, total / norms[h])
            loss = total if metric == "l2" else -total
            # NaN never wins, and neither does a distance that is not below +inf: such rows get index 0
            indices[h, start : start + step] = loss.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argmin(1)
    indices = indices.view(x.shape[:-1])
    return indices if mask is None else indices.masked_fill(~mask, -1)


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, beta: float, legacy_beta: bool, gradient: str, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiable by autograd, so that it is the oracle of `vector_quantize_backward` too."""
    indices = nearest_code(x.detach(), codebook.detach(), mask, metric, precision)
    return quantize(x, codebook, indices, beta, legacy_beta, gradient)


def quantize(
    x: Tensor, codebook: Tensor, indices: Tensor, beta: float, legacy_beta: bool, gradient: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `vector_quantize` returns, once the lookup is done; whoever has a faster lookup only uses it too."""
    dtype = torch.promote_types(x.dtype, codebook.dtype)
    codes = gather(codebook, indices).to(dtype)  # (..., D)
    rows = x.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    valid = (indices >= 0).unsqueeze(-1)  # (..., 1)
    terms = valid.sum().clamp(min=1).to(wide) * x.shape[-1]

    def mean_square(a: Tensor, b: Tensor) -> Tensor:
        return sum_of_squares(torch.where(valid, a.to(wide) - b.to(wide), 0)) / terms

    commitment_loss = mean_square(rows, codes.detach())
    codebook_loss = mean_square(rows.detach(), codes)
    loss = (
        beta * codebook_loss + commitment_loss if legacy_beta else codebook_loss + beta * commitment_loss
    )
    distance = (rows.detach().double() - codes.detach().double()).square().sum(-1, keepdim=True)
    values = torch.where(distance.isfinite(), codes.detach(), torch.nan)
    # value - (+0), here and in rotate_to, keeps every bit of a code; value + 0 would turn its -0 into +0
    through = rotate_to(rows, values) if gradient == "rotation" else values - (rows.detach() - rows)
    quantized = torch.where(valid, torch.where(distance.isfinite(), through, values), 0)
    return quantized, indices, loss, commitment_loss, codebook_loss


def rotate_to(rows: Tensor, codes: Tensor) -> Tensor:
    """The rotation trick (Fifty et al. 2024): codes = s R rows, with s and the rotation R held constant in the backward.

    R = 1 - 2 r r^T + 2 q e^T with e = x / |x|, q = c / |c|, r = (e + q) / |e + q|, s = |c| / |x|. Rows where one of the three
    norms is zero have no such rotation; their gradient passes straight through.
    """
    scale, e, q, r, exists = rotation(rows.detach(), codes)
    wide = rows.to(e.dtype)
    rotated = scale * (wide - 2 * r * (r * wide).sum(-1, keepdim=True) + 2 * q * (e * wide).sum(-1, keepdim=True))
    moved = torch.where(exists, rotated, wide)
    return codes - (moved.detach() - moved).to(codes.dtype)


def rotation(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """s (..., 1), e, q, r (..., D) of `rotate_to`, and where they exist (..., 1), in fp32 or better."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    x, c = rows.to(wide), codes.to(wide)
    x_norm, c_norm = (v.square().sum(-1, keepdim=True).sqrt() for v in (x, c))
    e, q = x / x_norm, c / c_norm
    r_norm = (e + q).square().sum(-1, keepdim=True).sqrt()
    exists = (x_norm > 0) & (c_norm > 0) & (r_norm > 0)
    s, e, q, r = (torch.where(exists, v, 0) for v in (c_norm / x_norm, e, q, (e + q) / r_norm))
    return s, e, q, r, exists


def vector_quantize_backward(
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    grad_commitment_loss: Tensor | None,
    grad_codebook_loss: Tensor | None,
    x: Tensor,
    quantized: Tensor,
    indices: Tensor,
    codebook_shape: list[int],
    beta: float,
    legacy_beta: bool,
    gradient: str,
    need_grad_x: bool,
    need_grad_codebook: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(quantized.dtype, torch.float32)
    valid = (indices >= 0).unsqueeze(-1)
    terms = valid.sum().clamp(min=1).to(wide) * x.shape[-1]
    difference = torch.where(valid, x.to(wide) - quantized.to(wide), 0) * (2 / terms)  # (..., D)
    zero = torch.zeros((), dtype=wide, device=x.device)
    g_loss, g_commitment, g_codebook = (zero if g is None else g for g in (grad_loss, grad_commitment_loss, grad_codebook_loss))
    grad_x, grad_codebook = x.new_empty(0), quantized.new_empty(0)
    if need_grad_x:
        total = difference * (g_commitment + g_loss * (1.0 if legacy_beta else beta))
        if grad_quantized is not None:
            g = grad_quantized.to(wide)
            if gradient == "rotation":
                s, e, q, r, exists = rotation(x, quantized)
                turned = s * (g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * e * (q * g).sum(-1, keepdim=True))
                g = torch.where(exists, turned, g)
            total = total + torch.where(valid, g, 0)
        grad_x = total.to(x.dtype)
    if need_grad_codebook:
        slope = (g_codebook.double() + g_loss.double() * (beta if legacy_beta else 1.0)) * 2 / terms.double()
        per_row = torch.where(valid, quantized.double() - x.double(), 0) * slope  # rounded once, after the sum
        sums = code_statistics(per_row, indices, None, codebook_shape[-2], len(codebook_shape) == 3, torch.float64)[0]
        grad_codebook = sums.to(quantized.dtype)
    return grad_x, grad_codebook


# -- shared -----------------------------------------------------------------------------------------------------------


def with_heads(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, int]:
    """x as (H, N, D), codebook as (H, K, D), H."""
    codes = codebook if codebook.dim() == 3 else codebook[None]
    count = math.prod(x.shape[codebook.dim() - 2 : -1])  # not -1, which H = 0 leaves undecided
    return x.reshape(len(codes), count, x.shape[-1]), codes, len(codes)


def squared_norms(codes: Tensor) -> Tensor:
    """Sum of squares over the last dimension in fp64, d ascending, two roundings per term. (H, K, D) -> (H, K)"""
    total = torch.zeros(codes.shape[:-1], dtype=torch.float64, device=codes.device)
    for d in range(codes.shape[-1]):
        total += codes[..., d].double().square()
    return total


def square_roots(values: Tensor) -> Tensor:
    """Correctly rounded: torch's fp64 sqrt on the CPU comes from a vector maths library and may be one ulp off, which would
    make a cosine tie of the definition depend on that library."""
    if values.device.type != "cpu":
        return values.sqrt()
    roots = [math.sqrt(v) for v in values.flatten().tolist()]
    return torch.tensor(roots, dtype=values.dtype, device=values.device).view_as(values)


def gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes of `indices` (...): (..., D). Index -1 (masked) takes code 0, which the caller masks out."""
    safe = indices.clamp(min=0)
    if codebook.dim() == 2:
        return codebook[safe]
    head = torch.arange(len(codebook), device=codebook.device).view(-1, *[1] * (indices.dim() - 1))
    return codebook[head, safe]


def sum_of_squares(values: Tensor) -> Tensor:
    """In an order that the sizes decide: what torch's sum of a whole tensor adds to what depends on the number of threads."""
    sums = values.contiguous().square().sum(-1).view(-1)  # (N,)
    while len(sums) > 1:
        groups = -(-len(sums) // 256)
        sums = torch.nn.functional.pad(sums, (0, 256 * groups - len(sums))).view(groups, 256).sum(-1)
    return sums.sum()
