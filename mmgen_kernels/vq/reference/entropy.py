"""code_entropy in plain PyTorch, a few rows at a time: never an N x K matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmgen_kernels.vq.reference.lookup import SCORES_AT_ONCE, with_heads

SCORES_HELD = 8  # matrices of scores that live at a time, at most
MAX_PART = 256  # rows


def code_entropy(
    x: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float, metric: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sample_entropy, mean_entropy, and what the backward wants: softmax_terms and mean_probability. All in fp64 inside.

    The three terms of a row are the largest of its scores over the temperature, the sum of e^(score - largest) and the mean of
    score - largest; 0, 1 and 0 where it is not valid.
    """
    rows, codes, heads = with_heads(x, codebook)  # (H, N, D), (H, K, D)
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    valid = valid_rows(mask, rows)  # (H, N)
    terms = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=x.device).repeat(*rows.shape[:2], 1)  # (H, N, 3)
    probability = codes.new_zeros(codes.shape[:2], dtype=torch.float64)  # (H, K), its sum over rows
    for h in range(heads):
        c, offsets, _, mean = prepared_codes(codes[h], metric, temperature)
        for part, r, _, counts in parts(rows[h], valid[h], codes.shape[1], metric, mean):
            scores = r @ c.t() + offsets  # (n, K)
            largest = scores.amax(1, keepdim=True)
            below = scores - largest
            e = below.exp()
            total = e.sum(1, keepdim=True)
            found = torch.cat((largest, total, (e * below).sum(1, keepdim=True) / total), 1)  # (n, 3)
            terms[h, part] = torch.where(counts, found, terms.new_tensor((0.0, 1.0, 0.0)))[: len(terms[h, part])]
            probability[h] += torch.where(counts, e / total, 0).sum(0)
    probability /= valid.sum(1, keepdim=True).clamp(min=1)
    sample_entropy = terms[..., 1].log() - terms[..., 2]  # (H, N)
    mean_entropy = torch.where(probability == 0, 0, -probability * (probability + eps).log()).sum(1)  # (H,)
    return (
        sample_entropy.view(x.shape[:-1]).to(wide),
        mean_entropy.view(codebook.shape[:-2]).to(wide),
        terms.view(*x.shape[:-1], 3),
        probability.view(codebook.shape[:-1]).to(wide),
    )


def code_entropy_backward(
    grad_sample_entropy: Tensor | None,
    grad_mean_entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    softmax_terms: Tensor,
    mean_probability: Tensor,
    temperature: float,
    metric: str,
    eps: float,
    need_grad_x: bool,
    need_grad_codebook: bool,
) -> tuple[Tensor, Tensor]:
    rows, codes, heads = with_heads(x, codebook)
    valid = valid_rows(mask, rows)
    terms = softmax_terms.reshape(*rows.shape[:2], 3)
    slopes = None if grad_sample_entropy is None else -grad_sample_entropy.double().reshape(rows.shape[:2])  # (H, N)
    weights = None
    if grad_mean_entropy is not None:
        weights = weights_of(mean_probability.reshape(codes.shape[:2]), valid.sum(1), grad_mean_entropy.reshape(heads), eps)
    grad_rows = torch.zeros(rows.shape, dtype=torch.float64, device=x.device)
    grad_codes = torch.zeros(codes.shape, dtype=torch.float64, device=x.device)
    for h in range(heads):
        c, offsets, code_scales, mean = prepared_codes(codes[h], metric, temperature)
        for part, r, scales, counts in parts(rows[h], valid[h], codes.shape[1], metric, mean):
            largest, total, mean_below = padded(terms[h, part], len(r)).split(1, 1)  # (n, 1) each
            below = r @ c.t() + offsets - largest  # (n, K)
            p = torch.where(counts, below.exp() / total, 0)
            slope = torch.zeros_like(p)
            if slopes is not None:
                slope += padded(slopes[h, part], len(r))[:, None] * (below - mean_below)
            if weights is not None:
                slope += weights[h] - (p @ weights[h])[:, None]
            gradient = torch.where(counts, p * slope, 0)  # of the scores
            to_rows = gradient @ c
            if metric == "cosine":
                to_rows = across(to_rows, r, scales)
            grad_rows[h, part] = torch.where(counts, to_rows, 0)[: len(grad_rows[h, part])]
            to_codes = gradient.t() @ r
            if metric == "l2":  # offsets are -|c|^2 / temperature, c holds 2 c / temperature
                to_codes -= gradient.sum(0)[:, None] * c * (temperature / 2)
            grad_codes[h] += to_codes
        grad_codes[h] *= (2 if metric == "l2" else 1) / temperature
        if metric == "cosine":
            grad_codes[h] = across(grad_codes[h], c * temperature, code_scales)
    return (
        grad_rows.view(x.shape).to(x.dtype) if need_grad_x else x.new_empty(0),
        grad_codes.view(codebook.shape).to(codebook.dtype) if need_grad_codebook else codebook.new_empty(0),
    )


def weights_of(mean_probability: Tensor, count: Tensor, grad_mean_entropy: Tensor, eps: float) -> Tensor:
    """(H, K) the gradient by each row's probability of a code, less their mean: a constant has no gradient."""
    q = mean_probability.double()
    derivative = -(q + eps).log() - q / (q + eps)
    if eps == 0:
        derivative = torch.where(q == 0, 0, derivative)
    weights = derivative * (grad_mean_entropy.double() / count.clamp(min=1))[:, None]
    return weights - (q * weights).sum(1, keepdim=True)


def valid_rows(mask: Tensor | None, rows: Tensor) -> Tensor:
    """The mask as (H, N); all true without one."""
    if mask is None:
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    return mask.reshape(rows.shape[:2])


def parts(
    rows: Tensor, valid: Tensor, num_codes: int, metric: str, mean: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
    """Which rows, they prepared (n, D), their inverse lengths, and whether they count (n, 1); their scores fit into the scratch.

    n is the same for every part and every batch, with rows of zeros at the end: another one would make the matrix product
    choose another kernel, and a row's last bits depend on the rows around it.
    """
    n = max(1, min(MAX_PART, SCORES_AT_ONCE // (SCORES_HELD * num_codes)))
    for start in range(0, len(rows), n):
        part = slice(start, start + n)
        counts = padded(valid[part], n)[:, None]
        r, scales = prepared(torch.where(counts, padded(rows[part], n), 0), metric, mean)  # one that does not count may be NaN
        yield part, r, scales, counts


def padded(values: Tensor, n: int) -> Tensor:
    """With zeros behind, to n along the first dimension."""
    return values if len(values) == n else torch.cat((values, values.new_zeros(n - len(values), *values.shape[1:])))


def prepared(vectors: Tensor, metric: str, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """fp64 as the metric sees them: less the mean code (l2) or of length 1 (cosine: the inverse lengths come too, 0 for 0)."""
    vectors = vectors.double()
    if mean is not None:
        return vectors - mean, None
    if metric == "dot":
        return vectors, None
    squared = vectors.square().sum(-1, keepdim=True)
    scales = torch.where(squared == 0, 0, squared.rsqrt())
    return vectors * scales, scales


def prepared_codes(
    codes: Tensor, metric: str, temperature: float
) -> tuple[Tensor, Tensor | float, Tensor | None, Tensor | None]:
    """(K, D) codes such that row @ code + offset is the score over the temperature, offsets, inverse lengths, the mean code.

    l2 is the same for all codes and rows less the mean code, which large offsets need and short means do not; -|x|^2, common to a
    row's scores, is left out.
    """
    mean = None
    if metric == "l2":
        mean = codes.mean(0, dtype=torch.float64)  # (D,)
        square = codes.double().square().sum(1).mean()
        mean = torch.where(mean.square().sum() > 0.5 * square, mean, 0)
    codes, scales = prepared(codes, metric, mean)
    if metric != "l2":
        return codes / temperature, 0.0, scales, mean
    return codes * (2 / temperature), -codes.square().sum(-1) / temperature, scales, mean


def across(gradient: Tensor, unit: Tensor, scales: Tensor | None) -> Tensor:
    """The gradient of v from that of v / |v|; 0 for a zero vector, whose score is a constant."""
    assert scales is not None
    return scales * (gradient - (gradient * unit).sum(-1, keepdim=True) * unit)
