"""diffusion_loss: each input is read once, forward and backward. Masks that are broadcast are written out first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.schedule.reference import computed_in
from mmgen_kernels.schedule.triton_kernels.pieces import (
    BLOCK,
    OPTIONS,
    Samples,
    load,
    multiple_of_8,
    number,
    numbers_of,
    on,
    places,
    real,
    store,
)
from mmgen_kernels.schedule.triton_kernels.sums import BLOCK_PIECES, add_up, contiguous, leave, pieces_of, upstream_of
from mmgen_kernels.triton_rounding import divide, narrow

LEAST_DELTA = tl.constexpr(2.0**-126)
INTEGERS = ["output_b", "target_b", "mask_b", "size", "pieces"]


@triton.jit
def delta_of(deltas, delta, sample, WIDE: tl.constexpr):
    if deltas is not None:
        given = tl.load(deltas + sample).to(tl.float64)
        return real(tl.where(given < LEAST_DELTA, LEAST_DELTA, given), WIDE)
    return real(number(delta, 0, 3), WIDE)


@triton.jit
def hypotenuse(size, delta):
    """Of numbers whose squares may overflow."""
    greater = tl.where(size > delta, size, delta)
    ratio = divide(tl.where(size > delta, delta, size), greater)
    found = greater * (tl.sqrt(1.0 + ratio * ratio) if size.dtype == tl.float64 else tl.sqrt_rn(1.0 + ratio * ratio))
    return tl.where(size == size, found, size)


@triton.jit
def difference_of(
    output, output_b, target, target_b, mask, mask_b, sample, i, inside, ALIGNED: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """And which elements there are that count."""
    valid = inside
    if mask is not None:
        valid = inside & (tl.load(mask + sample * multiple_of_8(mask_b, ALIGNED) + i, mask=inside, other=0) != 0)
    a = load(output, sample, output_b, i, inside, ALIGNED, WIDE)  # all of them, as `valid` would take every load apart
    return a - load(target, sample, target_b, i, inside, ALIGNED, WIDE), valid


@triton.jit(do_not_specialize=INTEGERS)
def lose(
    output, output_b, target, target_b, mask, mask_b, deltas, delta, partials, size, pieces,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of a piece of a sample."""
    size = multiple_of_8(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    sample = program // pieces
    i, inside = places(program % pieces, size, 0, BLOCK, False)
    d, valid = difference_of(output, output_b, target, target_b, mask, mask_b, sample, i, inside, ALIGNED, WIDE)
    bound = tl.zeros_like(d) + delta_of(deltas, delta, sample, WIDE)
    magnitude = tl.abs(d)
    if KIND == "mse":
        each = d * d
    elif KIND == "pseudo_huber":
        each = magnitude * divide(magnitude, hypotenuse(magnitude, bound) + bound)
    else:
        near = tl.where(magnitude > bound, bound, magnitude)
        each = (divide(near, bound) if KIND == "smooth_l1" else near) * (magnitude - near * 0.5)
    leave(partials, program, each, valid)


@triton.jit(do_not_specialize=["size", "pieces"])
def lose_samples(partials, counts, weight, losses, means, size, pieces, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    mean = divide(add_up(partials, sample, pieces, BLOCK), elements(counts, sample, size))
    tl.store(means + sample, mean)
    if weight is not None:
        mean *= tl.load(weight + sample).to(tl.float64)
    tl.store(losses + sample, mean)


@triton.jit
def elements(counts, sample, size):
    """How many count, but at least 1."""
    found = size.to(tl.int64)
    if counts is not None:
        found = tl.load(counts + sample)
    return tl.where(found < 1, 1, found).to(tl.float64)


@triton.jit(do_not_specialize=["size"])
def average(losses, loss, size, BLOCK: tl.constexpr):
    """Of the batch."""
    tl.store(loss, narrow(divide(add_up(losses, 0, size, BLOCK), size.to(tl.float64)), loss))


@triton.jit(do_not_specialize=[*INTEGERS, "samples"])
def slope_of_loss(
    output, output_b, target, target_b, mask, mask_b, counts, deltas, weight, grad_loss, grad_means, delta, grad_output,
    grad_target, size, pieces, samples,
    KIND: tl.constexpr, MEAN: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A piece of the gradients."""
    size = multiple_of_8(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    sample = program // pieces
    i, inside = places(program % pieces, size, 0, BLOCK, False)
    d, valid = difference_of(output, output_b, target, target_b, mask, mask_b, sample, i, inside, ALIGNED, WIDE)
    upstream = upstream_of(grad_loss, sample * 0 if MEAN else sample)
    if MEAN:
        upstream = divide(upstream, samples.to(tl.float64))
    if weight is not None:
        upstream *= tl.load(weight + sample).to(tl.float64)
    upstream = divide(upstream + upstream_of(grad_means, sample), elements(counts, sample, size))
    bound = tl.zeros_like(d) + delta_of(deltas, delta, sample, WIDE)
    if KIND == "mse":
        slope = d + d
    elif KIND == "pseudo_huber":
        slope = divide(d, hypotenuse(tl.abs(d), bound))
    else:
        slope = tl.where(d > bound, bound, tl.where(d < -bound, -bound, d))
        if KIND == "smooth_l1":
            slope = divide(slope, bound)
    found = tl.where(valid, slope * real(upstream, WIDE), 0.0)
    if grad_output is not None:
        store(grad_output, sample, size, i, inside, found)
    if grad_target is not None:
        store(grad_target, sample, size, i, inside, -found)


def prepared(output: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Samples, Tensor | None]:
    """And how many elements of each sample count."""
    if mask is None:
        return Samples(output, (output, target, None), True), None
    valid = mask.expand_as(output).contiguous()
    counts = valid.flatten(1).sum(1) if valid.dim() > 1 else valid.long()
    return Samples(output, (output, target, valid.view(torch.uint8)), True), counts


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
    B, dtype = output.shape[0], computed_in(output, target)
    losses, means = (output.new_empty(B, dtype=torch.float64) for _ in range(2))
    samples, counts = prepared(output, target, mask)
    size = output.numel() // max(B, 1)
    pieces = pieces_of(size, BLOCK)
    partials = output.new_empty(B * pieces, dtype=torch.float64)
    with on(output):
        if B > 0:
            lose[(B * pieces,)](
                *samples.arguments(), contiguous(deltas), numbers_of((delta,), 3), partials, size, pieces,
                KIND=kind, ALIGNED=samples.aligned, WIDE=dtype == torch.float64, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
            lose_samples[(B,)](partials, counts, contiguous(weight), losses, means, size, pieces, BLOCK=BLOCK_PIECES, **OPTIONS)
        if mean:
            loss = output.new_empty((), dtype=dtype)
            average[(1,)](losses, loss, B, BLOCK=BLOCK_PIECES, **OPTIONS)
            return loss, means
    return losses.to(dtype, copy=True), means


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
    B = output.shape[0]
    of_output = output.new_empty(output.shape if need_grad_output else 0)
    of_target = target.new_empty(target.shape if need_grad_target else 0)
    of_weight = output.new_empty(0)
    if need_grad_weight and weight is not None:
        upstream = means.new_zeros(B, dtype=torch.float64) if grad_loss is None else grad_loss.double().expand(B)
        of_weight = ((upstream / B if mean else upstream) * means.double()).to(weight.dtype)
    if output.numel() == 0 or not (need_grad_output or need_grad_target):
        return of_output, of_target, of_weight
    samples, counts = prepared(output, target, mask)
    size = output.numel() // B
    pieces = pieces_of(size, BLOCK)
    of_samples = (contiguous(t) for t in (deltas, weight, grad_loss, grad_means))
    grads = (of_output if need_grad_output else None, of_target if need_grad_target else None)
    with on(output):
        slope_of_loss[(B * pieces,)](
            *samples.arguments(), counts, *of_samples, numbers_of((delta,), 3), *grads, size, pieces, B, KIND=kind, MEAN=mean,
            ALIGNED=samples.aligned, WIDE=computed_in(output, target) == torch.float64, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return of_output, of_target, of_weight
