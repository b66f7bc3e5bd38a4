"""vq_diffusion_step and unmask_step: a program draws for some positions, reading their logits twice, and writes a few numbers each.

Tiles are (positions, classes). Where classes lie side by side a program has one position; where positions do, as many as fill a
line of memory. Sizes of tiles depend on the layout alone, and each position adds up its classes in their order, so that its bits
depend on nothing around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.philox.triton_kernels import block_of, log_uniform
from mmgen_kernels.schedule.reference.discrete import remasked, row_at, wide_dtype
from mmgen_kernels.schedule.triton_kernels.pieces import folded, key_of, multiple_of_8, number, numbers_of, on, real
from mmgen_kernels.schedule.triton_kernels.scheduler_step import exponential
from mmgen_kernels.triton_rounding import divide, widen

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Of positions and classes, by what lies side by side; in fp64 there is room for fewer.
TILES = {"classes": ((1, 1024), (1, 256)), "positions": ((32, 16), (32, 8)), "": ((1, 1024), (1, 256))}
STRIDES = ["by_sample", "by_position", "by_class", "e_sample", "e_position", "e_class"]
INTEGERS = ["positions", "classes", "known", "pieces", *STRIDES, "step", "steps", "mask_id"]


@triton.jit
def transition(row):
    """Of a row of the table on the device: what `transition_of_host` has of the host's, in fp64."""
    a, b, c = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    kept, replaced = tl.load(row + 3), tl.load(row + 4)
    before, even_before, masked_before = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    gone = tl.where(kept + replaced > 0.0, replaced / (kept + replaced), tl.where(kept + replaced == 0.0, 0.0, 1.0))
    of_mask = tl.where(masked_before > 0.0, masked_before / c, 0.0)
    mask_stays = (c <= 0.0) & (masked_before > 0.0)
    return before, even_before, b / (a + b), gone, of_mask, (b <= 0.0).to(tl.float64), mask_stays.to(tl.float64)


@triton.jit
def exponentials_at(pointer, start, k, valid, by_class, known, seed, offset, first, WIDE: tl.constexpr, TILE_K: tl.constexpr):
    """(positions, classes): given; or of the stream, in whose block `first` a position's classes begin. NaN from `known` on."""
    if pointer is None:
        a, b, c, d = block_of(seed, offset + first + (start // 4 + tl.arange(0, TILE_K // 4)[None, :]))
        e = -log_uniform(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)), WIDE)
    else:
        e = widen(tl.load(pointer + k * by_class, mask=valid & (k < known), other=1.0), WIDE)
    return tl.where(k < known, e, float("nan"))


@triton.jit(do_not_specialize=INTEGERS)
def draw_codes(
    logits, codes, noise, wait, numbers, table, index, key, out, found, positions, classes, known, pieces, by_sample, by_position,
    by_class, e_sample, e_position, e_class, step, steps, mask_id,
    DIFFUSES: tl.constexpr, LIKELIEST: tl.constexpr, STEP_PER_SAMPLE: tl.constexpr, KEY_PER_SAMPLE: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    """DIFFUSES: x_{t-1} and, where there is room, its log-probability. Else the codes of masked positions, and confidences."""
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
    code = tl.load(codes + sample * positions + n, mask=valid, other=0)
    place = sample * 0 + step
    if index is not None:
        place = tl.load(index + sample if STEP_PER_SAMPLE else index)
    place = tl.minimum(tl.maximum(place, 0), steps - 1)
    scale = real(number(numbers, 0, PARTS), WIDE)
    x = tl.minimum(tl.maximum(code, 0), classes) if DIFFUSES else tl.zeros_like(code) - 1  # whose weight is its own: here none

    # the softmax; x apart, as what the others have together must not drown in it
    most = tl.full([TILE_N, 1], float("-inf"), tl.float64 if WIDE else tl.float32)
    others = tl.zeros_like(most)
    own = tl.zeros_like(most)
    for start in range(0, classes, TILE_K):
        k = start + columns
        logit = widen(tl.load(at + k * step_of_class, mask=valid & (k < classes), other=float("-inf")), WIDE) * scale
        higher = tl.maximum(most, tl.max(logit, 1, keep_dims=True))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = exponential(most - level, WIDE)
        w = exponential(logit - level, WIDE)
        others = others * shrink + tl.sum(tl.where(k == x, 0.0, w), 1, keep_dims=True)
        own = own * shrink + tl.sum(tl.where(k == x, w, 0.0), 1, keep_dims=True)
        most = higher
    level = tl.where(most == float("-inf"), 0.0, most)
    total = others + own
    defined = (total > 0.0) & (total < float("inf"))

    # the weights: share w + even, and that of x
    one = tl.full([TILE_N, 1], 1.0, total.dtype)
    share = divide(one, total)
    even = tl.zeros_like(total)
    weight = tl.zeros_like(total)
    stays = valid & False
    if DIFFUSES:
        masked = x == classes
        if table is None:
            before, even_before, beta, gone = (number(numbers, 1, PARTS), number(numbers, 2, PARTS), number(numbers, 3, PARTS),
                                               number(numbers, 4, PARTS))  # fmt: skip
            of_mask, code_stays, mask_stays = number(numbers, 5, PARTS), number(numbers, 6, PARTS), number(numbers, 7, PARTS)
        else:
            before, even_before, beta, gone, of_mask, code_stays, mask_stays = transition(table + place * 9)
        before, even_before, beta = real(before, WIDE), real(even_before, WIDE), real(beta, WIDE)
        gone, of_mask = real(gone, WIDE), real(of_mask, WIDE)
        stays = tl.where(masked, mask_stays, code_stays) != 0.0
        p = own * share
        left = others * share + gone * p
        even = tl.where(masked, even_before, beta * even_before * left)
        weight = tl.where(masked, of_mask, before * gone * p + even_before * left)
        slope = tl.where(masked, before, beta * before)
        rest = tl.where(masked, classes, classes - 1).to(total.dtype)
        all_of_them = slope * (others * share) + even * rest + weight
        defined = defined & (all_of_them > 0.0) & (all_of_them < float("inf"))
        inverse = divide(one, all_of_them)
        share = share * slope * inverse
        even = even * inverse
        weight = weight * inverse

    # the race
    seed, offset = place, place
    first = n * 0
    if key is not None:
        seed, offset = key_of(key, sample, KEY_PER_SAMPLE)
        seed, offset = folded(seed, offset, place)
        first = (n if KEY_PER_SAMPLE else sample * positions + n) * ((classes + 4) // 4)
    e_at = noise if noise is None else noise + (sample * e_sample + n * e_position)
    best = tl.full([TILE_N, 1], float("-inf"), total.dtype)
    chosen = tl.zeros_like(n)
    chance = tl.zeros_like(total)
    for start in range(0, classes + DIFFUSES, TILE_K):
        k = start + columns
        logit = widen(tl.load(at + k * step_of_class, mask=valid & (k < classes), other=float("-inf")), WIDE) * scale
        v = tl.where(k < classes, share * exponential(logit - level, WIDE) + even, 0.0)
        v = tl.where(k == x, weight, v)
        if LIKELIEST:
            score = logit
        else:
            e = exponentials_at(e_at, start, k, valid, e_class, known, seed, offset, first, WIDE, TILE_K)
            score = divide(v, e)
        score = tl.where(score == score, score, float("-inf"))
        fastest, which = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True, keep_dims=True)
        leads = fastest > best
        of_fastest = tl.sum(tl.where(columns == which, v, 0.0), 1, keep_dims=True)
        chosen = tl.where(leads, start + which, chosen)
        chance = tl.where(leads, of_fastest, chance)
        best = tl.where(leads, fastest, best)

    nan = tl.full([TILE_N, 1], float("nan"), total.dtype)
    result = sample * positions + n
    if DIFFUSES:
        tl.store(out + result, tl.where(stays | (defined == 0), x, chosen), mask=valid)
        if found is not None:
            log_prob = tl.where(defined, tl.log(chance), nan)
            tl.store(found + result, tl.where(stays, 0.0, log_prob), mask=valid)
    else:
        heat = real(number(numbers, 1, PARTS) if table is None else tl.load(table + place * 2 + 1), WIDE)
        if key is None:
            e = widen(tl.load(wait + result, mask=valid, other=1.0), WIDE)
        else:
            a, b, c, d = block_of(seed, offset + first + classes // 4)
            r = classes % 4
            e = -log_uniform(tl.where(r == 0, a, tl.where(r == 1, b, tl.where(r == 2, c, d))), WIDE)
        confidence = tl.log(chance) - tl.where(heat == 0.0, 0.0, heat * tl.log(e))
        tl.store(out + result, tl.where((code == mask_id) & defined, chosen, code), mask=valid)
        tl.store(found + result, tl.where(defined, confidence, nan), mask=valid)


# -- launchers --------------------------------------------------------------------------------------------------------


def transition_of_host(row: list[float]) -> list[float]:
    """A', B', b / (a + b), B / (A + B), the mask's weight C' / c; whether a code stays and whether the mask does."""
    a, b, c, kept, replaced, _, before, even_before, masked_before = row
    gone = replaced / (kept + replaced) if kept + replaced > 0 else 0.0
    of_mask = masked_before / c if masked_before > 0 and c > 0 else 0.0
    return [before, even_before, b / (a + b) if b > 0 else 0.0, gone, of_mask, float(b <= 0), float(c <= 0 and masked_before > 0)]


def launch(
    logits: Tensor, codes: Tensor, noise: Tensor | None, wait: Tensor | None, table: Tensor, index: Tensor | None,
    key: Tensor | None, step: int, scale: float, out: Tensor, found: Tensor | None, dtype: torch.dtype, mask_id: int,
    diffuses: bool, likeliest: bool,
) -> None:  # fmt: skip
    B, N, K = logits.shape
    if codes.numel() == 0:
        return
    wide = dtype == torch.float64
    parts = 3 if wide else 1
    on_host = index is None and table.device.type == "cpu"
    numbers = [scale]
    if on_host:
        row = table[min(max(step, 0), len(table) - 1)].tolist()
        numbers += transition_of_host(row) if diffuses else row[1:]
    side_by_side = "classes" if logits.stride(2) == 1 or K == 1 else "positions" if logits.stride(1) == 1 else ""
    tile_n, tile_k = TILES[side_by_side][wide]
    apart = (logits.stride(0), *(logits.stride(d) for d, name in ((1, "positions"), (2, "classes")) if name != side_by_side))
    aligned = all(size % 8 == 0 for size in (*apart, K if side_by_side == "classes" else N))
    pieces = triton.cdiv(N, tile_n)
    with on(logits):
        draw_codes[(B * pieces,)](
            logits, codes.contiguous(), noise, None if wait is None else wait.contiguous(), numbers_of(numbers, parts),
            None if on_host else table.contiguous(), None if index is None else index.contiguous(),
            None if key is None else key.contiguous(), out, found, N, K, K + diffuses, pieces, *logits.stride(),
            *((0, 0, 0) if noise is None else noise.stride()), step, len(table), mask_id,
            DIFFUSES=diffuses, LIKELIEST=likeliest, STEP_PER_SAMPLE=index is not None and index.dim() == 1,
            KEY_PER_SAMPLE=key is not None and key.dim() == 2, SIDE_BY_SIDE=side_by_side, ALIGNED=aligned, WIDE=wide, PARTS=parts,
            TILE_N=tile_n, TILE_K=tile_k, **OPTIONS,
        )  # fmt: skip


def vq_diffusion_step(
    logits: Tensor, x_t: Tensor, noise: Tensor | None, transitions: Tensor, index: Tensor | None, key: Tensor | None, step: int,
    temperature: float, with_log_prob: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = wide_dtype(logits, noise)
    prev = torch.empty(x_t.shape, dtype=torch.int64, device=x_t.device)
    log_prob = torch.empty(x_t.shape if with_log_prob else 0, dtype=dtype, device=x_t.device)
    found = log_prob if with_log_prob else None
    launch(logits, x_t, noise, None, transitions, index, key, step, 1 / temperature, prev, found, dtype, 0, True, False)
    return prev, log_prob


def unmask_step(
    logits: Tensor, sample: Tensor, noise: Tensor | None, confidence_noise: Tensor | None, schedule: Tensor, index: Tensor | None,
    key: Tensor | None, step: int, mask_id: int, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = wide_dtype(logits, noise, confidence_noise)
    pred = torch.empty(sample.shape, dtype=torch.int64, device=sample.device)
    confidence = torch.empty(sample.shape, dtype=dtype, device=sample.device)
    likeliest = temperature == 0
    scale = 1.0 if likeliest else 1 / temperature
    arguments = (logits, sample, None if likeliest else noise, confidence_noise, schedule, index, key, step, scale)
    launch(*arguments, pred, confidence, dtype, mask_id, False, likeliest)
    ratio, _ = row_at(schedule, index, step)
    return remasked(pred, confidence, sample, ratio, mask_id), pred
