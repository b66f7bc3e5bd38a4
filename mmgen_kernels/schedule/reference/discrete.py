"""Steps of discrete diffusion in plain PyTorch: one position's codes are a race of exponentials, which the likeliest win.

The class m that maximises v_m / E_m, E_m being independent standard exponentials, is a draw by the weights v: Gumbel's argmax
without its logarithms. 16-bit logits are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.philox import reference as philox
from mmgen_kernels.schedule.reference.steps import step_of

ROW = 9  # of transitions: a, b, c of the step, of all steps up to it, and of all steps before it


def vq_diffusion_step(
    logits: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    transitions: Tensor,
    index: Tensor | None,
    key: Tensor | None,
    step: int,
    temperature: float,
    with_log_prob: bool,
) -> tuple[Tensor, Tensor]:
    K = logits.shape[-1]
    dtype = wide_dtype(logits, noise)
    x_t = x_t.clamp(0, K)  # K is the mask
    p = torch.softmax(logits.to(dtype) * (1 / temperature), -1)  # (B, N, K)
    a, b, c, A, B_, C, A_1, B_1, C_1 = row_at(transitions, index, step)
    del C
    masked = x_t == K
    settled = torch.where(masked, (c <= 0) & (C_1 > 0), b <= 0)  # nothing else can have become x_t
    own_p = p.gather(-1, x_t.clamp(max=K - 1)[..., None])[..., 0].double() * ~masked  # (B, N)
    new = torch.where(A + B_ > 0, B_ / (A + B_), 0.0)  # of x_t, how much of it was not x_0 all along
    rest = (1 - own_p) + new * own_p
    share = torch.where(masked, A_1, b * A_1)
    even = torch.where(masked, B_1, b * B_1 * rest)
    own = torch.where(masked, 0.0, (a + b) * (A_1 * new * own_p + B_1 * rest))
    mask = torch.where(masked & (C_1 > 0), C_1 / c, 0.0)
    total = share * (1 - own_p) + even * (K - (~masked).double()) + own + mask
    share, even, own, mask = (w / total for w in (share, even, own, mask))

    v = share.to(dtype)[..., None] * p + even.to(dtype)[..., None]
    v = torch.cat((v, mask.to(dtype)[..., None]), -1)  # (B, N, K + 1)
    v = torch.where(masked[..., None], v, v.scatter(-1, x_t[..., None], own.to(dtype)[..., None]))
    chosen = race(v, exponentials(noise, key, transitions, index, step, logits, dtype))
    defined = total.isfinite() & (total > 0)
    prev = torch.where(settled | ~defined, x_t, chosen)
    if not with_log_prob:
        return prev, logits.new_empty(0, dtype=dtype)
    log_prob = v.gather(-1, chosen[..., None])[..., 0].log()
    log_prob = torch.where(defined, log_prob, torch.nan)
    return prev, torch.where(settled, 0.0, log_prob).to(dtype)


def unmask_step(
    logits: Tensor,
    sample: Tensor,
    noise: Tensor | None,
    confidence_noise: Tensor | None,
    schedule: Tensor,
    index: Tensor | None,
    key: Tensor | None,
    step: int,
    mask_id: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    K = logits.shape[-1]
    dtype = wide_dtype(logits, noise, confidence_noise)
    wide = logits.to(dtype)
    log_p = torch.log_softmax(wide * (1 / temperature if temperature > 0 else 1.0), -1)  # (B, N, K)
    wait = confidence_noise
    if key is not None:
        drawn = exponentials(None, key, schedule, index, step, logits, dtype)
        noise, wait = drawn[..., :K], drawn[..., K]
    assert wait is not None
    chosen = wide.argmax(-1) if temperature == 0 or noise is None else race(log_p.exp(), noise.to(dtype))
    found = log_p.gather(-1, chosen[..., None])[..., 0]  # (B, N)
    ratio, heat = row_at(schedule, index, step)
    confidence = found - torch.where(heat == 0, 0.0, heat.to(dtype) * wait.to(dtype).log())
    pred = torch.where((sample == mask_id) & ~found.isnan(), chosen, sample)
    return remasked(pred, confidence, sample, ratio, mask_id), pred


def remasked(pred: Tensor, confidence: Tensor, sample: Tensor, ratio: Tensor, mask_id: int) -> Tensor:
    """The least confident of those that were masked are so again: as many as the ratio asks for, of equal ones the first."""
    unknown = sample == mask_id
    known = unknown.sum(1, keepdim=True)  # (B, 1): how many were masked
    wanted = torch.floor(sample.shape[1] * ratio.float()).clamp(max=sample.shape[1]).to(torch.int64)
    wanted = (known - 1).minimum(wanted).clamp(min=1).minimum(known) * (ratio > 0)
    limits = torch.finfo(confidence.dtype)
    confidence = confidence.nan_to_num(nan=-torch.inf, posinf=limits.max, neginf=-torch.inf)
    order = torch.where(unknown, confidence, torch.inf).sort(dim=1, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return torch.where(rank < wanted, mask_id, pred)


def race(v: Tensor, noise: Tensor) -> Tensor:
    """(B, N, K) -> (B, N). Of equal ones the first; what is not a number does not win."""
    scores = v / noise
    return torch.where(scores.isnan(), -torch.inf, scores).argmax(-1)


def exponentials(
    noise: Tensor | None, key: Tensor | None, table: Tensor, index: Tensor | None, step: int, logits: Tensor, dtype: torch.dtype
) -> Tensor:
    """(B, N, K + 1): as given, or of the key into which the step is folded; a position's numbers begin with a block."""
    if noise is not None:
        return noise.to(dtype)
    assert key is not None
    B, N, K = logits.shape
    at = step_of(index, step, table, key.device).expand(key.shape[:-1])
    return philox.philox_exponential(philox.fold_in(key, at), [B, N, (K + 4) // 4 * 4], dtype)[..., : K + 1]


def row_at(table: Tensor, index: Tensor | None, step: int) -> Sequence[Tensor]:
    """The numbers of the step, () each, which mix with any device's; or, by an index, (1, 1) or each sample's, (B, 1)."""
    if index is None:
        return table[min(max(step, 0), len(table) - 1)].unbind()
    rows = table.index_select(0, index.clamp(0, len(table) - 1).reshape(-1))  # a scalar in brackets would be waited for
    return rows[:, None].unbind(-1)


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
