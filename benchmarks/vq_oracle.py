"""The truth that the vq contestants are judged by, in fp64 and independent of the package under test."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # of the fp64 score matrix at a time: 128 MiB


def distances(x: Tensor, codes: Tensor) -> Tensor:
    """sum_d (x_d - c_d)^2 in fp64, d ascending, product and sum rounded apart. x, codes (..., D) broadcast."""
    total = torch.zeros(torch.broadcast_shapes(x.shape[:-1], codes.shape[:-1]), dtype=torch.float64, device=x.device)
    for d in range(x.shape[-1]):
        difference = x[..., d].double() - codes[..., d].double()
        total = total + difference * difference
    return total


def nearest_by_definition(x: Tensor, codebook: Tensor) -> Tensor:
    """Every distance of every row, as the contract is written: x (N, D), codebook (K, D) -> (N,). For small sizes."""
    return distances(x[:, None, :], codebook[None, :, :]).argmin(dim=-1)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """What `nearest_by_definition` returns, for whole benchmark shapes: x (N, D) or (H, N, D) -> (N,) or (H, N).

    An fp64 matrix product finds the candidates, the definition decides among them. With R = |x| + max |c| and
    u = 2^-53, the product's score and the definition's distance each err by less than (2D + 4) u R^2, so a code whose
    score is more than four times that above the least cannot be the nearest one; the factor 8 leaves room.
    """
    if x.dim() == 3:
        return torch.stack([nearest(head, codes) for head, codes in zip(x, codebook, strict=True)])
    codes = codebook.double()
    squares = codes.square().sum(-1)  # (K,)
    rows = max(1, CHUNK_ELEMENTS // max(1, len(codebook)))
    return torch.cat([_nearest_chunk(part, codebook, codes, squares) for part in x.split(rows)])


def _nearest_chunk(x: Tensor, codebook: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
    wide = x.double()
    scores = torch.addmm(squares, wide, codes.t(), alpha=-2)  # (n, K)
    radius = wide.norm(dim=-1) + squares.max().sqrt()
    slack = 8 * (2 * x.shape[-1] + 4) * 2.0**-53 * radius.square()
    row, code = (scores <= (scores.amin(-1) + slack)[:, None]).nonzero(as_tuple=True)
    exact = distances(x[row], codebook[code])
    least = torch.full_like(radius, torch.inf).scatter_reduce(0, row, exact, "amin")
    winner = torch.where(exact == least[row], code, len(codebook))
    return torch.full_like(row[:1].expand(len(x)), len(codebook)).scatter_reduce(0, row, winner, "amin")


def count_wrong(indices: Tensor, truth: Tensor) -> dict:
    """The figures that stand beside a time: rows checked, how many differ, and their share."""
    wrong = int((indices != truth).sum())
    return {"rows": truth.numel(), "wrong": wrong, "wrong_percent": round(100 * wrong / max(1, truth.numel()), 4)}


def training_step(x: Tensor, codebook: Tensor, indices: Tensor, upstream: Tensor, beta: float) -> tuple[Tensor, ...]:
    """(loss, dx, dcodebook) in fp64 of (upstream * quantized).sum() + loss, for the codes that a contestant chose.

    loss = mean (x - c)^2 (1 + beta), straight-through: dx = upstream + 2 beta (x - c) / (N D), dcodebook sums
    2 (c - x) / (N D) over the rows that chose the code. With the contestant's own indices a wrong one counts once.
    """
    wide, chosen = x.double(), codebook.double()[indices]
    difference = wide - chosen
    slope = 2.0 / x.numel()
    loss = (1 + beta) * difference.square().mean()
    dx = upstream.double() + beta * slope * difference
    dcodebook = torch.zeros_like(codebook, dtype=torch.float64).index_add_(0, indices, -slope * difference)
    return loss, dx, dcodebook


def relative_error(got: Tensor, truth: Tensor) -> float:
    """The largest error, relative to the largest true value."""
    return float((got.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300))
