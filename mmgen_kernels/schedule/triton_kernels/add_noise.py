"""add_noise: one launch, in which the shares of data and noise are made in fp64, of a sample's time or its entry of a table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmgen_kernels.schedule.reference import FASTEST, SLOWEST
from mmgen_kernels.schedule.triton_kernels.pieces import (
    BLOCK,
    OPTIONS,
    Samples,
    add_term,
    key_of,
    load,
    multiple_of_8,
    normals,
    on,
    places,
    real,
    start_of_stream,
    store,
)

INTEGERS = ["x0_b", "noise_b", "size", "pieces", "entries"]


@triton.jit
def quarter_turns(p):
    """cos(pi p / 2) and sin(pi p / 2) in fp64: the quadrant is exact, and within it the series. Triton's keep a table on the stack
    for angles that are far away."""
    quadrant = tl.floor(p + 0.5)
    x = (p - quadrant) * 1.5707963267948966
    t = x * x
    c, s = t * 0.0 + 1.0, t * 0.0 + 1.0
    for k in tl.static_range(9):  # the last terms are below 1e-19 for |x| <= pi / 4
        c = 1.0 - t * c / ((17 - 2 * k) * (18 - 2 * k))
        s = 1.0 - t * s / ((18 - 2 * k) * (19 - 2 * k))
    s = x * s
    quadrant = quadrant - 4.0 * tl.floor(quadrant * 0.25)
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where((quadrant == 1.0) | (quadrant == 2.0), -cosine, cosine)
    sine = tl.where(quadrant >= 2.0, -sine, sine)
    return cosine, sine


@triton.jit
def one_less_exponential(x):
    """1 - e^x in fp64, by the series where that is near 0."""
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = near * 0.0 + 1.0
    for k in tl.static_range(15):
        series = 1.0 + near * series / (16 - k)
    return tl.where(tl.abs(x) < 0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def weights_of(p, PATH: tl.constexpr, BY_INDEX: tl.constexpr, SLOWEST: tl.constexpr, FASTEST: tl.constexpr):
    """The shares of data and of noise, and their derivatives by time."""
    one = p * 0.0 + 1.0
    if PATH == "linear":
        data, noise, data_slope, noise_slope = 1.0 - p, p, -one, one
    elif PATH == "edm":
        data, noise, data_slope, noise_slope = one, p, 0.0 * one, one
    elif PATH == "gvp":
        data, noise = quarter_turns(p)
        data_slope, noise_slope = noise * -1.5707963267948966, data * 1.5707963267948966
    elif BY_INDEX:
        data, noise, data_slope, noise_slope = tl.sqrt(p), tl.sqrt(1.0 - p), 0.0 * one, 0.0 * one
    else:
        exponent = -p * p * ((FASTEST - SLOWEST) / 4) - p * (SLOWEST / 2)
        data, noise = tl.exp(exponent), tl.sqrt(one_less_exponential(2.0 * exponent))
        data_slope = data * (p * (FASTEST - SLOWEST) + SLOWEST) * -0.5
        noise_slope = -data * data_slope / noise
    return data, noise, data_slope, noise_slope


@triton.jit(do_not_specialize=INTEGERS)
def noise_samples(
    x0, x0_b, noise, noise_b, key, t, table, x_t, target, size, pieces, entries,
    PATH: tl.constexpr, TARGET: tl.constexpr, SLOWEST: tl.constexpr, FASTEST: tl.constexpr, KEY_PER_SAMPLE: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A piece of a sample."""
    size = multiple_of_8(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    sample, piece = program // pieces, program % pieces
    p = tl.load(t + sample)
    if table is not None:
        p = tl.load(table + tl.minimum(tl.maximum(p, 0), entries - 1))
    of_data, of_noise, data_slope, noise_slope = weights_of(p.to(tl.float64), PATH, table is not None, SLOWEST, FASTEST)
    block, lead = start_of_stream(sample, size, KEY_PER_SAMPLE)
    i, inside = places(piece, size, lead, BLOCK, key is not None and not KEY_PER_SAMPLE and not ALIGNED)
    data = load(x0, sample, x0_b, i, inside, ALIGNED, WIDE)
    if key is not None:
        seed, offset = key_of(key, sample, KEY_PER_SAMPLE)
        z = normals(seed, offset, block + piece * (BLOCK // 4), BLOCK, WIDE)
    else:
        z = load(noise, sample, noise_b, i, inside, ALIGNED, WIDE)
    zero = tl.zeros_like(data)
    total = add_term(add_term(zero, real(of_data, WIDE), data, True), real(of_noise, WIDE), z, True)
    store(x_t, sample, size, i, inside, total)
    if TARGET == "epsilon":
        store(target, sample, size, i, inside, z)
    if TARGET == "sample":
        store(target, sample, size, i, inside, data)
    if TARGET == "v":
        total = add_term(add_term(zero, real(-of_noise, WIDE), data, True), real(of_data, WIDE), z, True)
        store(target, sample, size, i, inside, total)
    if TARGET == "flow":
        total = add_term(add_term(zero, real(data_slope, WIDE), data, True), real(noise_slope, WIDE), z, True)
        store(target, sample, size, i, inside, total)


def add_noise(
    x0: Tensor, noise: Tensor | None, key: Tensor | None, t: Tensor, table: Tensor | None, path: str, target: str | None
) -> tuple[Tensor, Tensor]:
    x_t = torch.empty_like(x0, memory_format=torch.contiguous_format)
    made = x0.new_empty(0 if target is None else x0.shape)
    if x0.numel() == 0:
        return x_t, made
    per_sample = key is None or key.dim() == 2
    samples = Samples(x0, (x0, noise), True)
    pieces = triton.cdiv(samples.size + (0 if per_sample or samples.count == 1 else 3), BLOCK)
    with on(x0):
        noise_samples[(samples.count * pieces,)](
            *samples.arguments(), None if key is None else key.contiguous(), t.contiguous(),
            None if table is None else table.contiguous(), x_t, None if target is None else made, samples.size, pieces,
            1 if table is None else len(table), PATH=path, TARGET=target, SLOWEST=SLOWEST, FASTEST=FASTEST,
            KEY_PER_SAMPLE=per_sample, ALIGNED=samples.aligned,
            WIDE=any(s is not None and s.dtype == torch.float64 for s in (x0, noise)), BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return x_t, made
