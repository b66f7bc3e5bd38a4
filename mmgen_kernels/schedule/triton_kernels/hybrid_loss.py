"""hybrid_loss: the output, x0 and noise are read once, forward and backward, and what stands between them stays in registers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.schedule import reference
from mmgen_kernels.schedule.reference import losses as formulas
from mmgen_kernels.schedule.triton_kernels.pieces import (
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
from mmgen_kernels.schedule.triton_kernels.sums import (
    BLOCK_PIECES,
    add_up,
    contiguous,
    exponential_less_one,
    leave,
    pieces_of,
    upstream_of,
)
from mmgen_kernels.triton_rounding import divide, narrow

SLOPE, CUBIC = tl.constexpr(formulas.SLOPE), tl.constexpr(formulas.CUBIC)
LEAST_PROBABILITY = tl.constexpr(formulas.LEAST_PROBABILITY)
HALF_LEVEL, EDGE = tl.constexpr(formulas.HALF_LEVEL), tl.constexpr(formulas.EDGE)
FAR, SHARPEST = tl.constexpr(formulas.FAR), tl.constexpr(formulas.SHARPEST)
COLUMNS = tl.constexpr(reference.COLUMNS)
LN_2 = tl.constexpr(math.log(2))
INTEGERS = ["output_b", "x0_b", "noise_b", "size", "pieces", "entries"]


@triton.jit
def limited(values, bound):
    return tl.where(values > bound, bound, tl.where(values < -bound, -bound, values))


@triton.jit
def row_of(t, table, sample, entries):
    """Which one it is, and where it lies."""
    at = tl.load(t + sample)
    at = tl.minimum(tl.maximum(at, 0), entries - 1)
    return at, table + at.to(tl.int64) * COLUMNS


@triton.jit
def there(i, share):
    """Whether what a share multiplies is looked at, of each element: the interpreter has no `and` of a scalar."""
    return i * 0 + tl.where(share != 0.0, 1, 0) > 0


@triton.jit
def element(
    output, output_b, x0, x0_b, noise, noise_b, sample, size, i, inside, at, row, numbers,
    LEARNED: tl.constexpr, CLAMPS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """target - prediction; the true mean less the model's, and by how much that moves with a difference; v; x0."""
    of_data, of_noise = tl.load(row), tl.load(row + 1)
    wanted = inside if CLAMPS else inside & there(i, tl.where(at == 0, 1.0, of_data))
    data = load(x0, sample, x0_b, i, wanted, ALIGNED, WIDE)
    z = load(noise, sample, noise_b, i, inside & there(i, of_noise), ALIGNED, WIDE)
    target = tl.where(of_data != 0.0, real(of_data, WIDE) * data, 0.0) + real(of_noise, WIDE) * z
    difference = target - load(output, sample, output_b, i, inside, ALIGNED, WIDE)
    v = tl.zeros_like(difference)
    if LEARNED:
        v = load(output + size, sample, output_b, i, inside, ALIGNED, WIDE)
    factor = tl.load(row + 2)
    moving = tl.zeros_like(difference) + real(factor, WIDE)
    apart = moving * difference
    if CLAMPS:
        share = tl.load(row + 3)
        predicted = data - real(divide(factor, share), WIDE) * difference
        kept = limited(predicted, real(number(numbers, 1, 3), WIDE))
        apart = tl.where(share == 0.0, apart, real(share, WIDE) * (data - kept))
        moving = tl.where(share == 0.0, moving, tl.where(kept == predicted, moving, 0.0))
    return difference, apart, moving, v, data


@triton.jit
def divergence(apart, v, row, WIDE: tl.constexpr):
    """And its derivatives by the means' distance and by the logarithm of the model's variance."""
    true_log_variance, middle, slope = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    gap = real(middle - true_log_variance, WIDE) + real(slope, WIDE) * v
    inverse = tl.exp(-gap) * real(tl.exp(-true_log_variance), WIDE)
    less_one, square = exponential_less_one(-gap, WIDE), apart * apart * inverse
    return (less_one + gap + square) * 0.5, apart * inverse, (less_one + square) * -0.5


@triton.jit
def logit(deviations):
    return deviations * SLOPE * (deviations * deviations * CUBIC + 1.0)


@triton.jit
def decoder(apart, v, data, row, WIDE: tl.constexpr):
    """The negative logarithm of the probability of x0's level, as reference/losses.py makes it, and the same derivatives."""
    middle, slope = tl.load(row + 5), tl.load(row + 6)
    exponent = -0.5 * (real(middle, WIDE) + real(slope, WIDE) * v)
    inverse = tl.exp(tl.where(exponent > SHARPEST, SHARPEST, exponent))
    upper, lower = limited((apart + HALF_LEVEL) * inverse, FAR), limited((apart - HALF_LEVEL) * inverse, FAR)
    half, ends = limited(inverse * HALF_LEVEL, FAR), upper + lower
    width = half * (2.0 * SLOPE) * ((0.75 * ends * ends + half * half) * CUBIC + 1.0)
    is_least, is_greatest = data < -EDGE, data > EDGE
    of_upper, of_lower = tl.exp(-logit(upper)), tl.exp(logit(lower))
    one = tl.zeros_like(apart) + 1.0
    below = tl.where(is_greatest, 1.0, divide(one, 1.0 + of_upper))
    above = tl.where(is_least, 1.0, divide(one, 1.0 + of_lower))
    between = tl.where(is_least | is_greatest, 1.0, -exponential_less_one(-width, WIDE))
    probability = below * above * between
    lost = probability < LEAST_PROBABILITY
    steepness = tl.where(is_least | is_greatest, 0.0, divide(one, exponential_less_one(width, WIDE)))
    by_upper = tl.where(is_greatest, 0.0, divide(one, 1.0 + divide(one, of_upper)) + steepness)
    by_lower = tl.where(is_least, 0.0, divide(one, 1.0 + divide(one, of_lower)) + steepness)
    by_upper *= (upper * upper * (3.0 * CUBIC) + 1.0) * SLOPE
    by_lower *= (lower * lower * (3.0 * CUBIC) + 1.0) * SLOPE
    by_mean = tl.where(lost, 0.0, inverse * (by_lower - by_upper))
    by_log_variance = tl.where(lost, 0.0, (by_upper * upper - by_lower * lower) * 0.5)
    return -tl.log(tl.where(lost, LEAST_PROBABILITY, probability)), by_mean, by_log_variance


@triton.jit
def term_of(apart, v, data, at, row, WIDE: tl.constexpr):
    if at == 0:
        term, by_mean, by_log_variance = decoder(apart, v, data, row, WIDE)
    else:
        term, by_mean, by_log_variance = divergence(apart, v, row, WIDE)
    return term, by_mean, by_log_variance


@triton.jit(do_not_specialize=INTEGERS)
def lose_terms(
    output, output_b, x0, x0_b, noise, noise_b, t, table, numbers, squares, terms, size, pieces, entries,
    LEARNED: tl.constexpr, CLAMPS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a piece of a sample."""
    size = multiple_of_8(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    sample = program // pieces
    i, inside = places(program % pieces, size, 0, BLOCK, False)
    at, row = row_of(t, table, sample, entries)
    difference, apart, _, v, data = element(
        output, output_b, x0, x0_b, noise, noise_b, sample, size, i, inside, at, row, numbers, LEARNED, CLAMPS, ALIGNED, WIDE
    )
    term, _, _ = term_of(apart, v, data, at, row, WIDE)
    leave(squares, program, difference * difference, inside)
    leave(terms, program, term, inside)


@triton.jit(do_not_specialize=["size", "pieces"])
def lose_hybrid(squares, terms, losses, mses, vbs, numbers, size, pieces, KL: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    elements = tl.where(size < 1, 1, size).to(tl.float64)
    mse = divide(add_up(squares, sample, pieces, BLOCK), elements)
    vb = divide(add_up(terms, sample, pieces, BLOCK) * number(numbers, 0, 3), elements * LN_2)
    tl.store(mses + sample, narrow(mse, mses))
    tl.store(vbs + sample, narrow(vb, vbs))
    tl.store(losses + sample, narrow(vb if KL else mse + vb, losses))


@triton.jit(do_not_specialize=INTEGERS)
def slope_of_terms(
    output, output_b, x0, x0_b, noise, noise_b, t, table, numbers, grad_loss, grad_mse, grad_vb, grad_output, size,
    pieces, entries,
    KL: tl.constexpr, LEARNED: tl.constexpr, CLAMPS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A piece of the gradient, of both halves of the output."""
    size = multiple_of_8(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    sample = program // pieces
    i, inside = places(program % pieces, size, 0, BLOCK, False)
    at, row = row_of(t, table, sample, entries)
    difference, apart, moving, v, data = element(
        output, output_b, x0, x0_b, noise, noise_b, sample, size, i, inside, at, row, numbers, LEARNED, CLAMPS, ALIGNED, WIDE
    )
    elements = size.to(tl.float64)
    of_loss, of_mse, of_vb = upstream_of(grad_loss, sample), upstream_of(grad_mse, sample), upstream_of(grad_vb, sample)
    of_mse = divide((of_mse if KL else of_mse + of_loss) * -2.0, elements)
    of_prediction = real(of_mse, WIDE) * difference
    of_variance = tl.zeros_like(difference)
    if (grad_loss is not None) or (grad_vb is not None):
        of_vb = real(divide((of_vb + of_loss) * number(numbers, 0, 3), elements * LN_2), WIDE)
        _, by_mean, by_log_variance = term_of(apart, v, data, at, row, WIDE)
        of_variance = of_vb * real(tl.load(row + 6), WIDE) * by_log_variance
        if KL:
            of_prediction -= of_vb * moving * by_mean
    size_of_output = 2 * size if LEARNED else size
    store(grad_output, sample, size_of_output, i, inside, of_prediction)
    if LEARNED:
        store(grad_output + size, sample, size_of_output, i, inside, of_variance)


def prepared(output: Tensor, x0: Tensor, noise: Tensor, clamp: float | None) -> tuple[list, dict]:
    """What both kernels are given first, and last."""
    samples = Samples(x0, (output, x0, noise), True)
    # 16 bytes a thread of the widest tensor: with twice as much the backward's registers spill in fp64
    block = 2048 // max(t.element_size() for t in (output, x0, noise))
    flags = {
        "LEARNED": output.shape[1] == 2 * x0.shape[1],
        "CLAMPS": clamp is not None,
        "ALIGNED": samples.aligned,
        "WIDE": reference.computed_in(output, x0, noise) == torch.float64,
        "BLOCK": block,
    }
    return samples.arguments(), flags


def hybrid_loss(
    output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, table: Tensor, vb_weight: float, kl: bool, clamp: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, dtype = output.shape[0], reference.computed_in(output, x0, noise)
    losses, mses, vbs = (output.new_empty(B, dtype=dtype) for _ in range(3))
    if B == 0:
        return losses, mses, vbs
    size = x0.numel() // B
    arguments, flags = prepared(output, x0, noise, clamp)
    pieces = pieces_of(size, flags["BLOCK"])
    squares, terms = (output.new_empty(B * pieces, dtype=torch.float64) for _ in range(2))
    numbers = numbers_of((vb_weight, clamp or 0.0), 3)
    with on(output):
        lose_terms[(B * pieces,)](
            *arguments, t.contiguous(), table.contiguous(), numbers, squares, terms, size, pieces, len(table), **flags, **OPTIONS
        )
        lose_hybrid[(B,)](squares, terms, losses, mses, vbs, numbers, size, pieces, KL=kl, BLOCK=BLOCK_PIECES, **OPTIONS)
    return losses, mses, vbs


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
    grad_output = torch.empty_like(output, memory_format=torch.contiguous_format)
    if output.numel() == 0:
        return grad_output
    B = output.shape[0]
    size = x0.numel() // B
    arguments, flags = prepared(output, x0, noise, clamp)
    pieces = pieces_of(size, flags["BLOCK"])
    numbers = numbers_of((vb_weight, clamp or 0.0), 3)
    upstream = (contiguous(grad) for grad in (grad_loss, grad_mse, grad_vb))
    with on(output):
        slope_of_terms[(B * pieces,)](
            *arguments, t.contiguous(), table.contiguous(), numbers, *upstream, grad_output, size, pieces, len(table),
            KL=kl, **flags, **OPTIONS,
        )  # fmt: skip
    return grad_output
