"""vq_diffusion_loss: a program reads some places' logits twice and leaves their divergences, or once and writes their gradient.

Tiles are (positions, classes), as in discrete.py. The few numbers of a place are fp64, and named as in reference/discrete_loss.py;
the means of samples, of (B, N) numbers, are torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.schedule.reference.discrete import wide_dtype
from mmgen_kernels.schedule.reference.discrete_loss import composed, upstream
from mmgen_kernels.schedule.triton_kernels.discrete import TILES
from mmgen_kernels.schedule.triton_kernels.pieces import multiple_of_8, number, numbers_of, on
from mmgen_kernels.schedule.triton_kernels.scheduler_step import exponential
from mmgen_kernels.triton_rounding import divide, narrow, widen

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
PARTS = 3  # of a number of the table's, which is fp64
INTEGERS = ["positions", "classes", "pieces", "by_sample", "by_position", "by_class", "step", "steps"]


@triton.jit
def log_of_one_and(x):
    """log (1 + x) with what 1 + x has lost of a small x."""
    w = 1.0 + x
    return tl.log(w) + divide(x - (w - 1.0), w)


@triton.jit
def bend_of(u):
    return divide(u, 1.0 + u)


@triton.jit
def row_of(numbers, table, place, zero, PARTS: tl.constexpr):
    """a, b, c of the step, A, B, C of all steps before it, for each place alike: the interpreter spreads no scalar comparison."""
    if table is None:
        a, b, c = number(numbers, 0, PARTS), number(numbers, 1, PARTS), number(numbers, 2, PARTS)
        A, B, C = number(numbers, 3, PARTS), number(numbers, 4, PARTS), number(numbers, 5, PARTS)
    else:
        row = table + place * 9
        a, b, c = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        A, B, C = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    return a + zero, b + zero, c + zero, A + zero, B + zero, C + zero


@triton.jit
def softmax_of(ordinary, z0, z_t, largest, apart):
    """The sum of exponentials; the probabilities of x0, of x_t, of all others, of all but x0; -log of the first."""
    own0 = tl.exp((z0 - largest).to(tl.float64))
    own_t = tl.where(apart, tl.exp((z_t - largest).to(tl.float64)), 0.0)
    total = ordinary + own_t + own0
    p0, rest = own0 / total, (ordinary + own_t) / total
    missed = tl.where(own0 > total * 0.5, log_of_one_and(rest / p0), (largest - z0).to(tl.float64) + tl.log(total))
    return total, p0, own_t / total, ordinary / total, rest, missed


@triton.jit
def bound_of(a, b, c, A, B, C, K, hidden, apart, p0, p_t, ordinary, most):
    alike = (a + b) * (A + B) + (K - 1.0) * b * B
    other = (a + b) * B + b * (A + B) + (K - 2.0) * b * B
    of_codes = 1.0 / (A + K * B + tl.where(C > 0.0, C / c, 0.0))
    step = tl.where(hidden, of_codes, b / tl.where(apart, other, alike))
    q_o = step * B
    q0 = tl.where(hidden, of_codes, tl.where(apart, b / other, (a + b) / alike)) * (A + B)
    q_t = tl.where(apart, (a + b) * B / other, 0.0)
    codes = tl.where(hidden, of_codes * (A + K * B), 1.0)
    own = tl.where(apart, p_t, p0)
    fading = other / alike
    likely = tl.where(hidden, 1.0, ordinary + tl.where(apart, p0, 0.0) + fading * own)
    base = tl.where(hidden | apart, likely, likely / fading)
    pull = tl.where(hidden, 0.0, a * A / alike * own / likely)
    has_even = B > 0.0
    told0, told_t = A * p0, A * fading * p_t
    share0 = tl.where(has_even, told0 / (told0 + B * base), 1.0)
    ratio0 = (told0 + B * base) / (A + B)
    share_t = tl.where(apart & has_even, told_t / (told_t + B * likely), 0.0)
    ratio_t = tl.where(apart & has_even, (told_t + B * likely) / B, 1.0)
    rise = tl.where(has_even, A / B, 0.0) / likely
    rise = tl.where(rise > most, most, rise)
    return has_even, q_o, q0, q_t, codes, base, pull, share0, ratio0, share_t, ratio_t, rise


@triton.jit(do_not_specialize=INTEGERS)
def lose_places(
    logits, x0s, x_ts, mask, numbers, table, index, kls, misses, found, grad, positions, classes, pieces, by_sample,
    by_position, by_class, step, steps, g_sample, g_position, g_class,
    AUXILIARY: tl.constexpr, DERIVES: tl.constexpr, STEP_PER_SAMPLE: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Leaves the divergences in `kls`, -log p of x0 in `misses`; or, with the gradients by those there, DERIVES the logits'."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // pieces
    by_sample = multiple_of_8(by_sample, ALIGNED)
    step_of_class = 1 if SIDE_BY_SIDE == "classes" else multiple_of_8(by_class, ALIGNED)
    step_of_position = 1 if SIDE_BY_SIDE == "positions" else multiple_of_8(by_position, ALIGNED)
    positions = multiple_of_8(positions, ALIGNED and SIDE_BY_SIDE == "positions")
    classes = multiple_of_8(classes, ALIGNED and SIDE_BY_SIDE == "classes")
    n = (program % pieces) * TILE_N + tl.arange(0, TILE_N).to(tl.int64)[:, None]  # (positions, 1)
    valid = n < positions
    columns = tl.arange(0, TILE_K).to(tl.int64)[None, :]  # (1, classes)
    at = logits + (sample * by_sample + n * step_of_position)
    spot = sample * positions + n
    place = sample * 0 + step
    if index is not None:
        place = tl.load(index + sample if STEP_PER_SAMPLE else index)
    place = tl.minimum(tl.maximum(place, 0), steps - 1)
    a, b, c, A, B, C = row_of(numbers, table, place, tl.zeros([TILE_N, 1], tl.float64), PARTS)
    x0 = tl.minimum(tl.maximum(tl.load(x0s + spot, mask=valid, other=0), 0), classes - 1)
    x_t = tl.minimum(tl.maximum(tl.load(x_ts + spot, mask=valid, other=0), 0), classes)
    hidden = x_t == classes
    x_t = tl.where(hidden, x0, x_t)
    apart = x_t != x0
    settled = (hidden & (c <= 0.0) & (C > 0.0)) | ((hidden == 0) & (b <= 0.0)) | (A + B <= 0.0)
    if DERIVES:
        of_kl = tl.load(kls + spot, mask=valid, other=0.0)
        of_missed = tl.load(misses + spot, mask=valid, other=0.0)
        wanted = valid & ((of_missed != 0.0) | ((of_kl != 0.0) & (settled == 0)))
    else:
        wanted = valid & (settled == 0)
        if AUXILIARY:
            wanted = valid & (n >= 0)
        if mask is not None:
            wanted = wanted & (tl.load(mask + spot, mask=valid, other=0) != 0)
    any_wanted = tl.max(wanted.to(tl.int32)) > 0
    nothing = tl.full([TILE_N, 1], float("-inf"), tl.float64 if WIDE else tl.float32)
    z0 = tl.where(wanted, widen(tl.load(at + x0 * step_of_class, mask=wanted, other=0.0), WIDE), 0.0)
    z_t = tl.where(wanted, widen(tl.load(at + x_t * step_of_class, mask=wanted, other=0.0), WIDE), 0.0)
    most = 4.0e307 if WIDE else 8.0e37

    if DERIVES:
        largest = tl.load(found + spot * 3, mask=wanted, other=0.0).to(z0.dtype)
        ordinary_sum = tl.load(found + spot * 3 + 1, mask=wanted, other=0.0)
    else:
        largest = tl.where(z0 == z0, z0, nothing)
        largest = tl.where(z_t > largest, z_t, largest)
        ordinary_sum = tl.zeros([TILE_N, 1], tl.float64)
        for start in range(0, tl.where(any_wanted, classes, 0), TILE_K):
            k = start + columns
            logit = widen(tl.load(at + k * step_of_class, mask=wanted & (k < classes), other=float("-inf")), WIDE)
            logit = tl.where((k == x0) | (k == x_t), float("-inf"), logit)
            higher = tl.maximum(largest, tl.max(logit, 1, keep_dims=True))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            w = tl.sum(exponential(logit - level, WIDE), 1, keep_dims=True).to(tl.float64)
            ordinary_sum = ordinary_sum * exponential(largest - level, WIDE).to(tl.float64) + w
            largest = higher
    level = tl.where(largest == float("-inf"), 0.0, largest)
    total, p0, p_t, ordinary, rest, missed = softmax_of(ordinary_sum, z0, z_t, level, apart)
    K = classes.to(tl.float64)
    has_even, q_o, q0, q_t, codes, base, pull, share0, ratio0, share_t, ratio_t, rise = bound_of(
        a, b, c, A, B, C, K, hidden, apart, p0, p_t, ordinary, most
    )
    slope = (rise / total).to(z0.dtype)

    if DERIVES:
        bent = q_o * rise
        of_x0, of_x_t = q0 * share0, q_t * share_t
        others = of_x_t + bent * (ordinary - tl.load(found + spot * 3 + 2, mask=wanted, other=0.0))
        pulled = pull * (codes - of_x0 - others)
        level_of_all = of_x0 + others - pulled
        moves = settled == 0
        at_x0 = p0 * (others - tl.where(apart, pulled, 0.0)) + rest * (tl.where(apart, 0.0, pulled) - of_x0)
        at_x0 = tl.where(moves, of_kl * at_x0, 0.0) - of_missed * rest
        at_x_t = tl.where(moves, of_kl * (p_t * level_of_all - of_x_t + pulled), 0.0) + of_missed * p_t
        even = ((tl.where(moves, of_kl * (level_of_all - bent), 0.0) + of_missed) / total).to(z0.dtype)
        bend = (tl.where(moves, of_kl * bent, 0.0) / total).to(z0.dtype)
        slope = tl.where(moves, slope, 0.0)
        out = grad + (sample * g_sample + n * g_position)
        for start in range(0, classes, TILE_K):
            k = start + columns
            inside = wanted & (k < classes)
            e = exponential(widen(tl.load(at + k * step_of_class, mask=inside, other=0.0), WIDE) - level, WIDE)
            result = e * (even + bend * bend_of(slope * e))
            result = tl.where(k == x_t, at_x_t.to(z0.dtype), result)
            result = tl.where(k == x0, at_x0.to(z0.dtype), result)
            tl.store(out + k * g_class, narrow(tl.where(wanted, result, 0.0), grad), mask=valid & (k < classes))
    else:
        logarithms = tl.zeros([TILE_N, 1], tl.float64)
        turned = tl.zeros([TILE_N, 1], tl.float64)
        bends = tl.max((wanted & has_even).to(tl.int32)) > 0
        for start in range(0, tl.where(bends, classes, 0), TILE_K):
            k = start + columns
            logit = widen(tl.load(at + k * step_of_class, mask=wanted & (k < classes), other=float("-inf")), WIDE)
            logit = tl.where((k == x0) | (k == x_t), float("-inf"), logit)
            e = exponential(logit - level, WIDE)
            u = slope * e
            logarithms += tl.sum(log_of_one_and(u), 1, keep_dims=True).to(tl.float64)
            turned += tl.sum(e * bend_of(u), 1, keep_dims=True).to(tl.float64)
        count = K - 1.0 - apart.to(tl.float64)
        of_others = tl.where(has_even, q_o * (count * tl.log(base) + logarithms), 0.0)
        kl = q0 * tl.where(has_even, -tl.log(ratio0), missed) - q_t * tl.log(ratio_t) - of_others
        tl.store(kls + spot, tl.where(wanted & (settled == 0), kl, 0.0), mask=valid)
        tl.store(misses + spot, tl.where(wanted, missed, 0.0), mask=valid)
        tl.store(found + spot * 3, tl.where(wanted, largest.to(tl.float64), 0.0), mask=valid)
        tl.store(found + spot * 3 + 1, tl.where(wanted, ordinary_sum, 0.0), mask=valid)
        tl.store(found + spot * 3 + 2, tl.where(wanted & (settled == 0), turned / total, 0.0), mask=valid)


# -- launchers --------------------------------------------------------------------------------------------------------


def launch(
    logits: Tensor, x0: Tensor, x_t: Tensor, table: Tensor, index: Tensor | None, mask: Tensor | None, step: int,
    classes_first: bool, auxiliary: bool, by_kl: Tensor, by_missed: Tensor, places: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    if x0.numel() == 0:
        return
    (of_class, of_position), (B, N) = (1, 2) if classes_first else (2, 1), x0.shape
    K, wide = logits.shape[of_class], wide_dtype(logits) == torch.float64
    on_host = index is None and table.device.type == "cpu"
    row = table[min(max(step, 0), len(table) - 1)].tolist() if on_host else [0.0] * 9
    side_by_side = (
        "classes" if logits.stride(of_class) == 1 or K == 1 else "positions" if logits.stride(of_position) == 1 else ""
    )
    tile_n, tile_k = TILES[side_by_side][wide]
    strides = (logits.stride(0), logits.stride(of_position), logits.stride(of_class))
    apart = (strides[0], *(s for s, name in zip(strides[1:], ("positions", "classes"), strict=True) if name != side_by_side))
    aligned = all(size % 8 == 0 for size in (*apart, K if side_by_side == "classes" else N))
    pieces = triton.cdiv(N, tile_n)
    made = (0, 0, 0) if grad is None else (grad.stride(0), grad.stride(of_position), grad.stride(of_class))
    with on(logits):
        lose_places[(B * pieces,)](
            logits, x0.contiguous(), x_t.contiguous(), None if mask is None else mask.contiguous().view(torch.uint8),
            numbers_of(row[:3] + row[6:], PARTS), None if on_host else table.contiguous(),
            None if index is None else index.contiguous(), by_kl, by_missed, places, grad, N, K, pieces, *strides, step, len(table),
            *made, AUXILIARY=auxiliary, DERIVES=grad is not None, STEP_PER_SAMPLE=index is not None and index.dim() == 1,
            SIDE_BY_SIDE=side_by_side, ALIGNED=aligned, WIDE=wide, PARTS=PARTS, TILE_N=tile_n, TILE_K=tile_k, **OPTIONS,
        )  # fmt: skip


def vq_diffusion_loss(
    logits: Tensor, x0: Tensor, x_t: Tensor, transitions: Tensor, index: Tensor | None, weight: Tensor | None,
    aux_weights: Tensor | None, mask: Tensor | None, step: int, aux_weight: float | None, classes_first: bool, reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kl, missed = (torch.empty(x0.shape, dtype=torch.float64, device=x0.device) for _ in range(2))
    places = torch.empty((*x0.shape, 3), dtype=torch.float64, device=x0.device)
    auxiliary = aux_weight is not None or aux_weights is not None
    launch(logits, x0, x_t, transitions, index, mask, step, classes_first, auxiliary, kl, missed, places, None)
    return composed(kl, missed, places, weight, aux_weights, mask, aux_weight, reduction, wide_dtype(logits))


def vq_diffusion_loss_backward(
    grad_loss: Tensor | None, grad_vb: Tensor | None, grad_aux: Tensor | None, logits: Tensor, x0: Tensor, x_t: Tensor,
    transitions: Tensor, index: Tensor | None, weight: Tensor | None, aux_weights: Tensor | None, mask: Tensor | None,
    places: Tensor, step: int, aux_weight: float | None, classes_first: bool, reduction: str,
) -> Tensor:  # fmt: skip
    by_kl, by_missed = upstream(grad_loss, grad_vb, grad_aux, weight, aux_weights, mask, aux_weight, reduction, x_t)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    of = (logits, x0, x_t, transitions, index, None, step, classes_first, True)
    launch(*of, by_kl.contiguous(), by_missed.contiguous(), places.contiguous(), grad)
    return grad
