"""The losses of training in plain PyTorch, and their derivatives written out.

16-bit inputs are computed in fp32. What is summed over a sample is summed in fp64, and every result is rounded once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmgen_kernels.schedule.reference.steps import combined, in_one_dtype

COLUMNS = 7  # of a row of planner/hybrid.py's table
# The cumulative normal distribution is taken to be sigmoid(SLOPE (x + CUBIC x^3)), which is (1 + tanh(...)) / 2.
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
LEAST_PROBABILITY = 1e-12
HALF_LEVEL, EDGE = 1 / 255, 0.999  # 8-bit data in [-1, 1]: half of what lies between two levels; beyond the edge is the last one
FAR = 64.0  # deviations from the mean: whatever is further off has the probability 0 or 1
SHARPEST = 27.0  # exponent of an inverse deviation: below e^-27 all of the probability is at one level

# -- diffusion_loss ---------------------------------------------------------------------------------------------------


def diffusion_loss(
    output: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    deltas: Tensor | None,
    kind: str,
    delta: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    difference, valid = differences(output, target, mask)
    bound = bounds(deltas, delta, difference)
    magnitude = difference.abs()
    if kind == "mse":
        each = difference.square()
    elif kind == "pseudo_huber":
        each = magnitude * (magnitude / (hypotenuse(magnitude, bound) + bound))
    else:
        near = torch.minimum(magnitude, bound)
        each = (near / bound if kind == "smooth_l1" else near) * (magnitude - near / 2)
    means = sums(each) / valid
    losses = means.clone() if weight is None else weight.double() * means
    return (losses.mean() if mean else losses).to(difference.dtype), means  # whole: the gradient of the weight is rounded once


def diffusion_loss_backward(
    grad_loss: Tensor | None,
    grad_means: Tensor | None,
    output: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    deltas: Tensor | None,
    means: Tensor,
    kind: str,
    delta: float,
    mean: bool,
    need_grad_output: bool,
    need_grad_target: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    difference, valid = differences(output, target, mask)
    bound = bounds(deltas, delta, difference)
    upstream = torch.zeros_like(means, dtype=torch.float64)  # (B,)
    if grad_loss is not None:
        upstream = upstream + (grad_loss.double() / len(means) if mean else grad_loss.double())
    of_weight = upstream * means.double()
    if weight is not None:
        upstream = upstream * weight.double()
    if grad_means is not None:
        upstream = upstream + grad_means.double()
    if kind == "mse":
        slope = 2 * difference
    elif kind == "pseudo_huber":
        slope = difference / hypotenuse(difference, bound)
    else:
        slope = torch.clamp(difference, -bound, bound)
        slope = slope / bound if kind == "smooth_l1" else slope
    grad = slope * by_sample(upstream / valid, difference)
    if mask is not None:
        grad = torch.where(mask, grad, 0)
    return (
        grad.to(output.dtype) if need_grad_output else output.new_empty(0),
        -grad.to(target.dtype) if need_grad_target else target.new_empty(0),
        of_weight.to(weight.dtype) if need_grad_weight and weight is not None else output.new_empty(0),
    )


def differences(output: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """output - target, 0 where it is masked, and how many elements of each sample are valid, but at least 1."""
    wide_output, wide_target = in_one_dtype((output, target))
    difference = wide_output - wide_target
    if mask is None:
        return difference, max(math.prod(difference.shape[1:]), 1)
    valid = mask.expand_as(difference)
    return torch.where(valid, difference, 0), sums(valid).clamp(min=1)


def hypotenuse(a: Tensor, b: Tensor) -> Tensor:
    """Of what torch's own has, the vectors and what is left at their end differ in bits; and so have the logistic function's."""
    a = a.abs()
    greater = torch.maximum(a, b)
    return greater * torch.sqrt(1 + (torch.minimum(a, b) / greater).square())


def bounds(deltas: Tensor | None, delta: float, like: Tensor) -> Tensor:
    if deltas is None:
        return torch.full((), delta, dtype=like.dtype, device=like.device)
    return by_sample(deltas.clamp(min=torch.finfo(torch.float32).tiny), like)


def by_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def sums(t: Tensor) -> Tensor:
    """Over each sample, (B,) in fp64: halves are added to each other, as a reduction of torch depends on the batch."""
    rest = t.reshape(len(t), math.prod(t.shape[1:])).double()
    while (n := rest.shape[1]) > 1:
        half = n // 2
        folded = rest[:, :half] + rest[:, n - half :]
        rest = torch.cat((folded, rest[:, half : n - half]), 1) if n % 2 else folded
    return rest[:, 0] if rest.shape[1] else rest.new_zeros(len(t))


# -- hybrid_loss ------------------------------------------------------------------------------------------------------


def hybrid_loss(
    output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, table: Tensor, vb_weight: float, kl: bool, clamp: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    step = step_of(output, x0, noise, t, table, clamp)
    nll = -torch.log(decoder(step).probability.clamp(min=LEAST_PROBABILITY))
    gap = step.log_variance - step.true_log_variance
    divergence = (torch.expm1(-gap) + gap + step.apart.square() * torch.exp(-step.log_variance)) / 2
    count = max(math.prod(x0.shape[1:]), 1)
    vb = sums(torch.where(step.is_first, nll, divergence)) * (vb_weight / (math.log(2) * count))
    mse = sums(step.difference.square()) / count
    loss = vb.clone() if kl else mse + vb
    dtype = step.apart.dtype
    return loss.to(dtype), mse.to(dtype), vb.to(dtype)


def hybrid_loss_backward(
    grad_loss: Tensor | None,
    grad_mse: Tensor | None,
    grad_vb: Tensor | None,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    table: Tensor,
    vb_weight: float,
    kl: bool,
    clamp: float | None,
) -> Tensor:
    step = step_of(output, x0, noise, t, table, clamp)
    like, count = step.difference, max(math.prod(x0.shape[1:]), 1)

    def upstream(grads: list[Tensor | None], factor: float) -> Tensor | None:
        given = [g.double() for g in grads if g is not None]
        return by_sample(torch.stack(given).sum(0) * (factor / count), like) if given else None

    of_mse = upstream([grad_mse, None if kl else grad_loss], -2)
    of_vb = upstream([grad_vb, grad_loss], vb_weight / math.log(2))
    of_prediction = (0 if of_mse is None else of_mse) * like  # NaN stays
    of_variance = torch.zeros_like(like)
    if of_vb is not None:
        found = decoder(step)
        lost = found.probability < LEAST_PROBABILITY
        precision = torch.exp(-step.log_variance)
        gap = step.log_variance - step.true_log_variance
        by_log_variance = -(torch.expm1(-gap) + step.apart.square() * precision) / 2
        by_log_variance = torch.where(step.is_first, torch.where(lost, 0, found.by_log_variance), by_log_variance)
        of_variance = of_vb * step.slope * by_log_variance
        if kl:
            by_mean = torch.where(step.is_first, torch.where(lost, 0, found.by_mean), step.apart * precision)
            of_prediction = of_prediction - of_vb * torch.where(step.inside, step.factor, 0) * by_mean
    learned = output.shape[1] == 2 * x0.shape[1]
    return (torch.cat((of_prediction, of_variance), 1) if learned else of_prediction).to(output.dtype)


class Step(NamedTuple):
    difference: Tensor  # target - prediction
    apart: Tensor  # the mean of q(x_{t-1} | x_t, x0) - the model's
    inside: Tensor  # where the predicted data are not clamped
    factor: Tensor  # by which a difference sets the means apart, (B, 1, ...)
    log_variance: Tensor
    slope: Tensor  # of log_variance by the model's output, (B, 1, ...)
    true_log_variance: Tensor  # (B, 1, ...)
    is_first: Tensor  # (B, 1, ...)
    x0: Tensor


def step_of(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, table: Tensor, clamp: float | None) -> Step:
    out, data, eps = in_one_dtype((output, x0, noise))
    C = data.shape[1]
    at = t.clamp(0, len(table) - 1)
    of_data, of_noise, factor, share, true_log_variance, middle, slope = (by_sample(c, data) for c in table[at].unbind(1))
    difference = combined([of_data, of_noise], [data, eps]) - out[:, :C]
    apart = factor * difference
    inside = torch.ones_like(apart, dtype=torch.bool)
    if clamp is not None:
        predicted = data - apart / share
        limited = predicted.clamp(-clamp, clamp)
        inside = (limited == predicted) | (share == 0)
        apart = torch.where(share == 0, apart, share * (data - limited))
    log_variance = middle + slope * out[:, C:] if out.shape[1] > C else middle.expand_as(data)
    is_first = (at == 0).reshape(middle.shape)
    return Step(difference, apart, inside, factor, log_variance, slope, true_log_variance, is_first, data)


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


class Decoded(NamedTuple):
    probability: Tensor  # of the level that x0 is
    by_mean: Tensor  # the derivative of its negative logarithm by x0 - mean
    by_log_variance: Tensor


def decoder(step: Step) -> Decoded:
    """With sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)), of which every factor is exact in the tails."""
    inverse = torch.exp((-step.log_variance / 2).clamp(max=SHARPEST))
    upper, lower = (((step.apart + edge) * inverse).clamp(-FAR, FAR) for edge in (HALF_LEVEL, -HALF_LEVEL))
    half = (inverse * HALF_LEVEL).clamp(max=FAR)

    def logit(deviations: Tensor) -> Tensor:
        return SLOPE * deviations * (1 + CUBIC * deviations.square())

    a, b = logit(lower), logit(upper)
    width = SLOPE * 2 * half * (1 + CUBIC * (0.75 * (upper + lower).square() + half.square()))  # b - a
    is_least, is_greatest = step.x0 < -EDGE, step.x0 > EDGE
    below = torch.where(is_greatest, 1, logistic(b))
    above = torch.where(is_least, 1, logistic(-a))
    between = torch.where(is_least | is_greatest, 1, -torch.expm1(-width))
    steepness = torch.where(is_least | is_greatest, 0, 1 / torch.expm1(width))
    by_b = torch.where(is_greatest, 0, logistic(-b) + steepness) * SLOPE * (1 + 3 * CUBIC * upper.square())
    by_a = -torch.where(is_least, 0, logistic(a) + steepness) * SLOPE * (1 + 3 * CUBIC * lower.square())
    return Decoded(below * above * between, -inverse * (by_a + by_b), (by_a * lower + by_b * upper) / 2)
