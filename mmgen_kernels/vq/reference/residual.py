"""residual_quantize in plain PyTorch.

Codebooks come as (L, K, D), or as (K_0 + K_1 + .., D) with the sizes K_l of the levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmgen_kernels.vq.reference.codebook import code_statistics
from mmgen_kernels.vq.reference.lookup import gather, nearest_code, rotate_to, rotation, sum_of_squares

Choose = Callable[[int, Tensor], Tensor]  # (level, residual (..., D)) -> indices (...), -1 where the row takes no part


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    levels: Tensor | None,
    mask: Tensor | None,
    depth: int,
    beta: float,
    gradient: str,
    metric: str,
    precision: str,
    statistics: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiable by autograd, so that it is the oracle of `residual_quantize_backward` too."""
    books = codebook_per_level(codebooks.detach(), sizes)
    taken = levels_taken(x, levels, mask, depth)

    def nearest(level: int, residual: Tensor) -> Tensor:
        return nearest_code(residual, books[level], taken > level, metric, precision)

    return quantize_levels(x, codebooks, sizes, nearest, beta, gradient, statistics)


def quantize_levels(
    x: Tensor, codebooks: Tensor, sizes: list[int], choose: Choose, beta: float, gradient: str, statistics: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `residual_quantize` returns, with the indices that `choose` finds for each residual."""
    dtype = torch.promote_types(x.dtype, codebooks.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    residual = x.to(wide)  # to x the identity at every level: the codes count as constants
    total = torch.zeros_like(residual.detach())  # (..., D)
    sound = torch.ones(*x.shape[:-1], 1, dtype=torch.bool, device=x.device)
    found, losses, counts, sums = [], [], [], []
    for level, book in enumerate(codebook_per_level(codebooks, sizes)):
        index = choose(level, residual.detach())  # (...)
        valid = (index >= 0).unsqueeze(-1)
        codes = gather(book, index).to(wide)  # (..., D)
        if statistics is not None:
            added, count = code_statistics(residual.detach(), index, None, len(book), False, statistics)
            counts.append(count)
            sums.append(added)
        of_x, of_codes = residual - codes.detach(), residual.detach() - codes
        sound = sound & (distance_is_finite(of_x.detach()) | ~valid)
        spoil = torch.where(sound, 1.0, torch.nan).to(wide)  # a factor, so that the row's gradient is NaN too
        terms = valid.sum().clamp(min=1).to(wide) * x.shape[-1]
        commitment, codebook = (sum_of_squares(torch.where(valid, d * spoil, 0)) / terms for d in (of_x, of_codes))
        losses.append(codebook + beta * commitment)
        residual = torch.where(valid, of_x * spoil, residual)
        total = torch.where(valid, codes.detach() if level == 0 else total + codes.detach(), total)
        found.append(index)
    indices = torch.stack(found, -1)  # (..., L)
    rows, values = x.to(dtype), torch.where(sound, total, torch.nan).to(dtype)
    # value - (+0), here and in rotate_to, keeps every bit; value + 0 would turn -0 into +0
    through = rotate_to(rows, values) if gradient == "rotation" else values - (rows.detach() - rows)
    quantized = torch.where((indices >= 0).any(-1, keepdim=True), through * torch.where(sound, 1.0, torch.nan).to(dtype), 0)
    shape = codebooks.shape if statistics is not None else (0,)
    return (
        quantized,
        indices,
        torch.stack(losses),
        torch.cat(counts).view(shape[:-1]) if counts else indices.new_empty(0),
        torch.cat(sums).view(shape) if sums else total.new_empty(0),
    )


def residual_quantize_backward(
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    sizes: list[int],
    beta: float,
    gradient: str,
    need_grad_x: bool,
    need_grad_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    """The residuals are computed again: rounded as in the forward, they are the same."""
    wide = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    residual = x.to(wide)
    total = torch.zeros_like(residual)  # (..., D), quantized before its rounding
    pull = torch.zeros_like(residual)  # (..., D), the losses' gradient to x
    to_codebooks = []
    for level, book in enumerate(codebook_per_level(codebooks, sizes)):
        index = indices[..., level].clamp(max=len(book) - 1)
        valid = (index >= 0).unsqueeze(-1)
        codes = gather(book, index).to(wide)
        rest = residual - codes
        rest = torch.where(distance_is_finite(rest), rest, torch.nan)
        residual = torch.where(valid, rest, residual)
        total = torch.where(valid, total + codes, total)
        slope = 2 / (valid.sum().clamp(min=1).to(wide) * x.shape[-1])
        slope = torch.zeros_like(slope) if grad_loss is None else slope * grad_loss[level]
        rest = torch.where(valid, rest, 0) * slope
        pull = pull + beta * rest
        if need_grad_codebooks:
            to_codebooks.append(code_statistics(-rest, index, None, len(book), False, wide)[0])
    grad_x, grad_codebooks = x.new_empty(0), codebooks.new_empty(0)
    if need_grad_x:
        if grad_quantized is not None:
            g = grad_quantized.to(wide)
            if gradient == "rotation":
                s, e, q, r, exists = rotation(x.to(wide), total)
                turned = s * (g - 2 * r * (r * g).sum(-1, keepdim=True) + 2 * e * (q * g).sum(-1, keepdim=True))
                g = torch.where(exists, turned, g)
            pull = pull + torch.where((indices >= 0).any(-1, keepdim=True), g, 0)
        grad_x = pull.to(x.dtype)
    if need_grad_codebooks:
        grad_codebooks = torch.cat(to_codebooks).view(codebooks.shape).to(codebooks.dtype)
    return grad_x, grad_codebooks


# -- shared -----------------------------------------------------------------------------------------------------------


def codebook_per_level(codebooks: Tensor, sizes: list[int]) -> list[Tensor]:
    """(K_l, D) for each level."""
    return list(codebooks.unbind(0)) if codebooks.dim() == 3 else list(codebooks.split(sizes))


def levels_taken(x: Tensor, levels: Tensor | None, mask: Tensor | None, depth: int) -> Tensor:
    """In how many levels each row takes part: (...)"""
    taken = torch.full(x.shape[:-1], depth, dtype=torch.int64, device=x.device)
    if levels is not None:
        taken = taken.minimum(levels.clamp(min=0).view(-1, *[1] * (x.dim() - 2)))
    return taken if mask is None else taken.masked_fill(~mask, 0)


def distance_is_finite(difference: Tensor) -> Tensor:
    """(..., D) -> (..., 1)"""
    return difference.double().square().sum(-1, keepdim=True).isfinite()
