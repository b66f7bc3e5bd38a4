"""The variational bound of discrete diffusion in plain PyTorch, and its derivative written out.

Of the true probabilities q of x_{t-1}, x0 has its own, x_t too where it is another code, and all other codes have one in common,
q_o. The model's are there ``P = q_o base (1 + u)``, u being proportional to p. So the divergence wants the logarithm of P / q at
two codes, and over all others the sum of ``log (1 + u)``. 16-bit logits are computed in fp32; the few numbers of a place, and what
is summed over classes or over places, in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.schedule.reference.discrete import row_at, wide_dtype
from mmgen_kernels.schedule.reference.losses import sums


def vq_diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    transitions: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    aux_weights: Tensor | None,
    mask: Tensor | None,
    step: int,
    aux_weight: float | None,
    classes_first: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of = Softmax(logits, x0, x_t, classes_first)
    bound = Bound(of, row_at(transitions, index, step))
    u = bound.rises()  # (B, N, K)
    turned = over_classes(of.others * (u / (1 + u))) / of.total  # (B, N): the sum of p u / (1 + u)
    kl = bound.divergence(over_classes(u.log1p()))
    places = torch.stack((of.largest.double(), of.ordinary * of.total, turned), -1)  # (B, N, 3)
    looked_at = torch.ones_like(bound.settled) if aux_weight is not None or aux_weights is not None else ~bound.settled
    looked_at = looked_at if mask is None else looked_at & mask
    places = torch.where(looked_at[..., None], places, 0.0)

    kl, missed = (torch.where(looked_at, number, 0.0) for number in (kl, of.missed))
    return composed(kl, missed, places, weight, aux_weights, mask, aux_weight, reduction, of.others.dtype)


def composed(
    kl: Tensor,
    missed: Tensor,
    places: Tensor,
    weight: Tensor | None,
    aux_weights: Tensor | None,
    mask: Tensor | None,
    aux_weight: float | None,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's results, of each place's divergence and -log p of x0, (B, N) in fp64, 0 where they are not looked at."""
    vb, aux = (sums(number) / valid_places(mask, kl) for number in (kl, missed))  # (B,)
    share = shares(aux_weights, aux_weight, vb)
    if reduction == "places":
        loss = kl if share is None else kl + share[:, None] * missed
        loss = loss if weight is None else weight.double()[:, None] * loss
    else:
        loss = vb if share is None else vb + share * aux
        loss = loss if weight is None else weight.double() * loss
        loss = loss.mean() if reduction == "mean" else loss
    return loss.to(dtype), vb.to(dtype), (aux[:0] if share is None else aux).to(dtype), places


def vq_diffusion_loss_backward(
    grad_loss: Tensor | None,
    grad_vb: Tensor | None,
    grad_aux: Tensor | None,
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    transitions: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    aux_weights: Tensor | None,
    mask: Tensor | None,
    places: Tensor,
    step: int,
    aux_weight: float | None,
    classes_first: bool,
    reduction: str,
) -> Tensor:
    of = Softmax(logits, x0, x_t, classes_first)
    bound = Bound(of, row_at(transitions, index, step))
    by_kl, by_missed = upstream(grad_loss, grad_vb, grad_aux, weight, aux_weights, mask, aux_weight, reduction, x_t)
    even, bent, at_x0, at_x_t = (torch.where(bound.settled, 0.0, by_kl * slope) for slope in bound.slopes(places[..., 2]))
    u = bound.rises()
    grad = of.others * like(1 / of.total, of) * (like(even + by_missed, of) + like(bent, of) * (u / (1 + u)))
    at_x_t = like(at_x_t + by_missed * of.p_t, of)
    grad = torch.where(of.apart[..., None], grad.scatter(-1, of.x_t[..., None], at_x_t), grad)
    grad = grad.scatter(-1, of.x0[..., None], like(at_x0 - by_missed * of.rest, of))
    idle = (bound.settled | (by_kl == 0)) & (by_missed == 0)  # nothing depends on it: it is not looked at
    grad = torch.where(idle[..., None], 0, grad).to(logits.dtype)
    return grad.mT if classes_first else grad


class Softmax:
    """Of each place (B, N), in fp64: the sum of exponentials, and the probabilities of x0, of x_t and of all but x0."""

    def __init__(self, logits: Tensor, x0: Tensor, x_t: Tensor, classes_first: bool):
        z = (logits.mT if classes_first else logits).to(wide_dtype(logits))  # (B, N, K)
        self.K = K = z.shape[-1]
        self.x0, self.masked = x0.clamp(0, K - 1), x_t >= K
        self.x_t = torch.where(self.masked, self.x0, x_t.clamp(0, K - 1))
        self.apart = self.x_t != self.x0  # x_t is another code
        self.largest = z.amax(-1)
        own0, own_t = (self.at(z, code).sub(self.largest).double().exp() for code in (self.x0, self.x_t))
        e = (z - self.largest[..., None]).exp()
        self.others = e.scatter(-1, self.x0[..., None], 0).scatter(-1, self.x_t[..., None], 0)  # of all but those two
        own_t = own_t * self.apart
        ordinary = over_classes(self.others) + 0 * (own0 + own_t)  # NaN of any logit
        self.total = ordinary + own_t + own0
        self.p0, self.p_t, self.ordinary = own0 / self.total, own_t / self.total, ordinary / self.total
        self.rest = (ordinary + own_t) / self.total  # 1 - p0
        away = (self.largest - self.at(z, self.x0)).double() + self.total.log()
        self.missed = torch.where(own0 > self.total / 2, (self.rest / self.p0).log1p(), away)  # -log p0

    @staticmethod
    def at(t: Tensor, code: Tensor) -> Tensor:
        return t.gather(-1, code[..., None])[..., 0]


class Bound:
    """The divergence of each place, by the row of its step: a, b, c of the step, A', B', C' of all steps before it."""

    def __init__(self, of: Softmax, row: Sequence[Tensor]):
        a, b, c, _, _, _, A_1, B_1, C_1 = row
        self.of, K, apart, hidden = of, of.K, of.apart, of.masked
        nothing = A_1 + B_1 <= 0  # no code is left before the step
        self.settled = torch.where(hidden, (c <= 0) & (C_1 > 0), b <= 0) | nothing
        # what the probabilities of x_{t-1} are to be divided by: where x0 = x_t, where it is another code, where x_t is the mask
        alike, other = (a + b) * (A_1 + B_1) + (K - 1) * b * B_1, (a + b) * B_1 + b * (A_1 + B_1) + (K - 2) * b * B_1
        codes = 1 / (A_1 + K * B_1 + torch.where(C_1 > 0, C_1 / c, 0.0))
        step = torch.where(hidden, codes, b / torch.where(apart, other, alike))
        self.q_o = step * B_1
        self.q0 = torch.where(hidden, codes, torch.where(apart, b / other, (a + b) / alike)) * (A_1 + B_1)
        self.q_t = torch.where(apart, (a + b) * B_1 / other, 0.0)
        self.codes = torch.where(hidden, codes * (A_1 + K * B_1), 1.0)  # the sum of q over all codes
        own = of.p0 * ~apart + of.p_t  # of x_t
        fading, kept = other / alike, a * A_1 / alike  # which add up to 1
        likely = torch.where(hidden, 1.0, of.ordinary + of.p0 * apart + fading * own)  # sum_k p_k q(x_t | x_t) / q(x_t | k)
        self.base = torch.where(hidden | apart, likely, likely / fading)
        self.pull = torch.where(hidden, 0.0, kept * own / likely)  # how p of x_t lowers `likely`
        self.has_even = B_1 > 0
        self.share0 = torch.where(self.has_even, A_1 * of.p0 / (A_1 * of.p0 + B_1 * self.base), 1.0)  # of P, what p tells
        self.ratio0 = (A_1 * of.p0 + B_1 * self.base) / (A_1 + B_1)  # P / q at x0, and at x_t
        even = B_1 * likely
        self.share_t = torch.where(apart & self.has_even, A_1 * fading * of.p_t / (A_1 * fading * of.p_t + even), 0.0)
        self.ratio_t = torch.where(apart & self.has_even, (A_1 * fading * of.p_t + even) / B_1, 1.0)
        rise = torch.where(self.has_even, A_1 / B_1, 0.0) / likely  # u / p
        self.rise = rise.clamp(max=torch.finfo(of.others.dtype).max / 4)

    def rises(self) -> Tensor:
        """u, (B, N, K), 0 at x0 and x_t."""
        return self.of.others * like(self.rise / self.of.total, self.of)

    def divergence(self, logarithms: Tensor) -> Tensor:
        of = self.of
        count = of.K - 1 - of.apart.double()
        at_x0 = torch.where(self.has_even, -self.ratio0.log(), of.missed)
        others = torch.where(self.has_even, self.q_o * (count * self.base.log() + logarithms), 0.0)
        return torch.where(self.settled, 0.0, self.q0 * at_x0 - self.q_t * self.ratio_t.log() - others)

    def slopes(self, turned: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The derivative by the logits: p (even + bent u / (1 + u)), and those of x0 and of x_t."""
        of = self.of
        bent = self.q_o * self.rise
        of_x0, of_x_t = self.q0 * self.share0, self.q_t * self.share_t
        others = of_x_t + bent * (of.ordinary - turned)
        pulled = self.pull * (self.codes - of_x0 - others)
        level = of_x0 + others - pulled
        at_x0 = of.p0 * (others - pulled * of.apart) + of.rest * (pulled * ~of.apart - of_x0)
        return level - bent, bent, at_x0, of.p_t * level - of_x_t + pulled


def upstream(
    grad_loss: Tensor | None,
    grad_vb: Tensor | None,
    grad_aux: Tensor | None,
    weight: Tensor | None,
    aux_weights: Tensor | None,
    mask: Tensor | None,
    aux_weight: float | None,
    reduction: str,
    x_t: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients by the divergence and by -log p of x0 at each place, (B, N), in fp64."""
    B, N = x_t.shape
    count = valid_places(mask, x_t)  # (B,)
    none = torch.zeros(B, N, dtype=torch.float64, device=x_t.device)
    of_loss = none
    if grad_loss is not None:
        each = grad_loss.double() if reduction == "places" else grad_loss.double().reshape(-1, 1)
        each = each / B if reduction == "mean" else each
        each = each if weight is None else each * weight.double()[:, None]
        of_loss = (each if reduction == "places" else each / count[:, None]).expand(B, N)
    share = shares(aux_weights, aux_weight, count)
    by_kl, by_missed = of_loss, none if share is None else share[:, None] * of_loss
    if grad_vb is not None:
        by_kl = by_kl + (grad_vb.double() / count)[:, None]
    if grad_aux is not None and share is not None:
        by_missed = by_missed + (grad_aux.double() / count)[:, None]
    return (by_kl, by_missed) if mask is None else (torch.where(mask, by_kl, 0.0), torch.where(mask, by_missed, 0.0))


def shares(aux_weights: Tensor | None, aux_weight: float | None, samples: Tensor) -> Tensor | None:
    """Of the auxiliary term in the loss of each sample, (B,)."""
    if aux_weights is not None:
        return aux_weights.double()
    return None if aux_weight is None else torch.full_like(samples, aux_weight, dtype=torch.float64)


def valid_places(mask: Tensor | None, places: Tensor) -> Tensor:
    """(B,), at least 1."""
    valid = torch.ones_like(places, dtype=torch.bool) if mask is None else mask
    return sums(valid).clamp(min=1)


def over_classes(t: Tensor) -> Tensor:
    """(B, N, K) -> (B, N) in fp64, in an order that depends on K alone."""
    return sums(t.reshape(-1, t.shape[-1])).reshape(t.shape[:-1])


def like(number: Tensor, of: Softmax) -> Tensor:
    """(B, N) or (B, N, 1) beside the classes."""
    return number.to(of.others.dtype)[..., None]
