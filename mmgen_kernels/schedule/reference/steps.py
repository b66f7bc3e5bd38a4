"""A step of a sampler, guidance and noising in plain PyTorch, and the derivatives written out.

16-bit inputs are computed in fp32, and every result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.philox import reference as philox

INPUTS = 5
SLOWEST, FASTEST = 0.1, 20.0  # beta of the continuous variance preserving process

Number = float | Tensor  # of the host, or of a device and then of a shape that broadcasts with the samples

# -- scheduler_step ---------------------------------------------------------------------------------------------------


def scheduler_step(
    input_0: Tensor,
    coefficients: Tensor,
    step: int,
    dtype_0: torch.dtype,
    input_1: Tensor | None,
    dtype_1: torch.dtype | None,
    input_2: Tensor | None,
    input_3: Tensor | None,
    input_4: Tensor | None,
    dtype_2: torch.dtype | None,
    clamp: float | None,
    noise: Tensor | None,
    key: Tensor | None,
    index: Tensor | None,
    uncond: Tensor | None,
    guided: int,
    guidance_scale: float,
    guidance_rescale: float,
    variance: Tensor | None,
    threshold: float | None,
    threshold_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (input_0, input_1, input_2, input_3, input_4, uncond, noise, variance)
    *inputs, uncond, noise, variance = in_one_dtype(tensors)
    inputs = [u for u in inputs if u is not None]
    row = row_of(coefficients, index, step, input_0)
    z = noise if key is None else drawn(key, coefficients, index, step, inputs[0])
    if uncond is not None:
        inputs[guided] = guidance(inputs[guided], uncond, guidance_scale, guidance_rescale)
    if variance is not None and z is not None:
        z = z * deviation(row[-1], variance)
    derived = combined(row[0], [*inputs, None, z])
    if clamp is not None:
        derived = derived.clamp(-clamp, clamp)
    if threshold is not None:
        derived = thresholded(derived, threshold, threshold_max)
    dtypes = [d for d in (dtype_0, dtype_1, dtype_2) if d is not None]
    outputs = [combined(row[1 + k], [*inputs, derived, z]).to(dtype) for k, dtype in enumerate(dtypes)]
    outputs += [input_0.new_empty(0, dtype=dtype_0) for _ in range(3 - len(outputs))]
    return outputs[0], outputs[1], outputs[2]


def scheduler_step_backward(
    grad_output_0: Tensor | None,
    grad_output_1: Tensor | None,
    grad_output_2: Tensor | None,
    input_0: Tensor,
    input_1: Tensor | None,
    input_2: Tensor | None,
    input_3: Tensor | None,
    input_4: Tensor | None,
    uncond: Tensor | None,
    noise: Tensor | None,
    variance: Tensor | None,
    coefficients: Tensor,
    index: Tensor | None,
    key: Tensor | None,
    step: int,
    guided: int,
    guidance_scale: float,
    guidance_rescale: float,
    clamp: float | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    tensors = (input_0, input_1, input_2, input_3, input_4, uncond, noise, variance)
    *inputs, wide_uncond, wide_noise, wide_variance = in_one_dtype(tensors)
    inputs = [u for u in inputs if u is not None]
    n, nothing = len(inputs), torch.zeros_like(inputs[0])
    grads = [None if g is None else g.to(nothing.dtype) for g in (grad_output_0, grad_output_1, grad_output_2)]
    row = row_of(coefficients, index, step, input_0)
    outputs = row[1 : len(row) - (variance is not None)]
    z = wide_noise if key is None else drawn(key, coefficients, index, step, inputs[0])
    spread = None if z is None or wide_variance is None else deviation(row[-1], wide_variance)

    def through(column: int) -> Tensor:  # what the outputs' gradients are to the term of that column
        return combined([of[column] for of in outputs], grads[: len(outputs)], nothing)

    of_derived = through(n)
    if clamp is not None:
        predictions = list(inputs)
        if wide_uncond is not None:
            predictions[guided] = guidance(inputs[guided], wide_uncond, guidance_scale, guidance_rescale)
        derived = combined(row[0], [*predictions, None, z if spread is None else z * spread])
        of_derived = torch.where((derived >= -clamp) & (derived <= clamp), of_derived, nothing)
    found: dict[int, Tensor] = {j: through(j) + combined([row[0][j]], [of_derived], nothing) for j in range(n)}
    if wide_uncond is not None:
        needed = (True, True)
        args = (found[guided], inputs[guided], wide_uncond, guidance_scale, guidance_rescale, *needed)
        found[guided], found[INPUTS] = guidance_backward(*args)
    if z is not None:
        of_noise = through(n + 1) + combined([row[0][n + 1]], [of_derived], nothing)
        if spread is not None:
            of_noise = of_noise * spread
            found[INPUTS + 2] = of_noise * z * ((row[-1][1] - row[-1][0]) / 4)
        found[INPUTS + 1] = of_noise
    return tuple(
        found.get(i, nothing).to(t.dtype) if t is not None and need else input_0.new_empty(0)
        for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
    )


def in_one_dtype(tensors: Sequence[Tensor | None]) -> list[Any]:
    wide = computed_in(*tensors)
    return [None if t is None else t.to(wide) for t in tensors]


def computed_in(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where one of them is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def row_of(coefficients: Tensor, index: Tensor | None, step: int, like: Tensor) -> list[list[Number]]:
    """The numbers of the step, or each sample's."""
    if index is None and coefficients.device.type == "cpu":
        return coefficients[min(max(step, 0), len(coefficients) - 1)].tolist()
    at = step_of(index, step, coefficients, coefficients.device)
    row = coefficients[at]  # (R, C) or (B, R, C)
    shape = [-1] + [1] * (like.dim() - 1) if row.dim() == 3 else []
    return [[row[..., k, j].reshape(shape) for j in range(row.shape[-1])] for k in range(row.shape[-2])]


def step_of(index: Tensor | None, step: int, coefficients: Tensor, device: torch.device) -> Tensor:
    at = torch.full((), step, device=device) if index is None else index
    return at.clamp(0, len(coefficients) - 1)


def drawn(key: Tensor, coefficients: Tensor, index: Tensor | None, step: int, like: Tensor) -> Tensor:
    """The noise of a step: of the key into which its number is folded."""
    at = step_of(index, step, coefficients, key.device).expand(key.shape[:-1])
    return philox.philox_normal(philox.fold_in(key, at), list(like.shape), like.dtype)


def combined(factors: Sequence[Number], terms: Sequence[Tensor | None], nothing: Tensor | None = None) -> Tensor:
    """The sum of the products; of a factor 0 the term is not there, whatever it is."""
    total = torch.zeros_like(next(t for t in terms if t is not None)) if nothing is None else nothing
    for factor, term in zip(factors, terms, strict=False):
        if term is None:
            continue
        if isinstance(factor, Tensor):
            factor = factor.to(term.dtype)
            total = total + torch.where(factor == 0, 0, factor * term)
        elif factor != 0:
            total = total + factor * term
    return total


def thresholded(derived: Tensor, ratio: float, maximum: float) -> Tensor:
    """Clipped to a quantile of each sample's magnitudes, where that is above 1, and divided by it."""
    if derived.numel() == 0:
        return derived
    bound = torch.quantile(derived.abs().flatten(1), ratio, dim=1).clamp(1, maximum)
    bound = bound.reshape(-1, *[1] * (derived.dim() - 1))
    return derived.clamp(-bound, bound) / bound


def deviation(of_range: Sequence[Number], variance: Tensor) -> Tensor:
    """Between the least and the greatest logarithm of a variance, by a prediction in [-1, 1]."""
    low, high = (v.to(variance.dtype) if isinstance(v, Tensor) else v for v in of_range[:2])
    share = (variance + 1) / 2
    return torch.exp((share * high + (1 - share) * low) / 2)


# -- guidance ---------------------------------------------------------------------------------------------------------


def guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: float) -> Tensor:
    dtype = cond.dtype
    cond, uncond = in_one_dtype((cond, uncond))
    guided = uncond + scale * (cond - uncond)
    if rescale != 0:
        guided = guided * (rescale * (deviation_of_samples(cond) / deviation_of_samples(guided)) + (1 - rescale))
    return guided.to(dtype)


def guidance_backward(
    grad_guided: Tensor | None,
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    rescale: float,
    need_grad_cond: bool,
    need_grad_uncond: bool,
) -> tuple[Tensor, Tensor]:
    dtypes = cond.dtype, uncond.dtype
    if grad_guided is None:
        grad_guided = torch.zeros_like(cond)
    grad, cond, uncond = in_one_dtype((grad_guided, cond, uncond))
    of_cond: Number = 0.0
    if rescale != 0:
        guided = uncond + scale * (cond - uncond)
        a, b = deviation_of_samples(cond), deviation_of_samples(guided)
        of_ratio = rescale * of_samples(torch.sum, grad * guided)
        count = max(math.prod(cond.shape[1:]) - 1, 0)
        of_cond = of_ratio / b * centred(cond) / (a * count)
        of_guided = of_ratio * -a / b.square() * centred(guided) / (b * count)
        grad = grad * (rescale * a / b + (1 - rescale)) + of_guided
    return (
        (scale * grad + of_cond).to(dtypes[0]) if need_grad_cond else cond.new_empty(0, dtype=dtypes[0]),
        ((1 - scale) * grad).to(dtypes[1]) if need_grad_uncond else cond.new_empty(0, dtype=dtypes[1]),
    )


def of_samples(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """A number of each sample, (B, 1, ...). One at a time: torch reduces a batch in another order than a sample alone."""
    found = [function(sample) for sample in t]
    return (torch.stack(found) if found else t.new_empty(0)).reshape(-1, *[1] * (t.dim() - 1))


def deviation_of_samples(t: Tensor) -> Tensor:
    return of_samples(torch.std, t)


def centred(t: Tensor) -> Tensor:
    return t - of_samples(torch.mean, t)


# -- add_noise --------------------------------------------------------------------------------------------------------


def add_noise(
    x0: Tensor, noise: Tensor | None, key: Tensor | None, t: Tensor, table: Tensor | None, path: str, target: str | None
) -> tuple[Tensor, Tensor]:
    data, eps = in_one_dtype((x0, noise))
    if eps is None:
        assert key is not None
        eps = philox.philox_normal(key, list(x0.shape), data.dtype)
    of_data, of_noise, *of_target = (w.to(data.dtype) for w in weights(t, table, path, target, x0.dim()))
    x_t = combined([of_data, of_noise], [data, eps]).to(x0.dtype)
    if target is None:
        return x_t, x0.new_empty(0)
    return x_t, combined(of_target, [data, eps]).to(x0.dtype)


def add_noise_backward(
    grad_x_t: Tensor | None,
    grad_target: Tensor | None,
    x0_shape: list[int],
    t: Tensor,
    table: Tensor | None,
    path: str,
    target: str | None,
    need_grad_x0: bool,
    need_grad_noise: bool,
) -> tuple[Tensor, Tensor]:
    like = next((g for g in (grad_x_t, grad_target) if g is not None), None)
    if like is None:
        return t.new_zeros(x0_shape), t.new_zeros(x0_shape)
    grads = in_one_dtype((grad_x_t, grad_target))
    factors = [w.to(like.device) for w in weights(t, table, path, target, len(x0_shape))]
    wanted = (need_grad_x0, need_grad_noise)  # the shares of x0, then those of noise
    results = [combined(factors[i::2], grads).to(like.dtype) if wanted[i] else like.new_empty(0) for i in range(2)]
    return results[0], results[1]


def weights(t: Tensor, table: Tensor | None, path: str, target: str | None, dims: int) -> list[Tensor]:
    """The shares of data and noise in x_t and then in the target, (B, 1, ...) each, in fp64."""
    p = (t if table is None else table[t.clamp(0, len(table) - 1)]).double()
    one = torch.ones_like(p)
    if path == "linear":
        data, noise, data_slope, noise_slope = 1 - p, p, -one, one
    elif path == "edm":
        data, noise, data_slope, noise_slope = one, p, 0 * one, one
    elif path == "gvp":
        data, noise = torch.cos(math.pi / 2 * p), torch.sin(math.pi / 2 * p)
        data_slope, noise_slope = -math.pi / 2 * noise, math.pi / 2 * data
    elif table is not None:
        data, noise = p.sqrt(), (1 - p).sqrt()
        data_slope = noise_slope = 0 * one  # an index has no derivative: the checks refuse a target that needs one
    else:
        exponent = -p.square() * (FASTEST - SLOWEST) / 4 - p * SLOWEST / 2
        data, noise = exponent.exp(), (-torch.expm1(2 * exponent)).sqrt()
        data_slope = -data * (p * (FASTEST - SLOWEST) + SLOWEST) / 2
        noise_slope = -data * data_slope / noise
    found = [data, noise]
    if target is not None:
        found += {
            "epsilon": (0 * one, one),
            "sample": (one, 0 * one),
            "v": (-noise, data),
            "flow": (data_slope, noise_slope),
        }[target]
    return [w.reshape(-1, *[1] * (dims - 1)) for w in found]
