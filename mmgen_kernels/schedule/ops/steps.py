"""A step of a sampler, guidance and noising."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_floats
from mmgen_kernels.schedule import reference
from mmgen_kernels.schedule.ops.checks import (
    FAMILY,
    MAX_OUTPUTS,
    check_alike,
    check_coefficients,
    check_dtypes,
    check_finite,
    check_inputs,
    check_limits,
    check_times,
    split_noise,
)
from mmgen_kernels.schedule.reference import INPUTS

# Of so many fp32 numbers on a CPU at most, `torch.add` takes less time than the operator: on one thread of an AMD EPYC (Zen 4) 2 us
# for 9 at 2^10, 36 for 55 at 2^18, 172 for 236 at 2^20, but 1407 for 1306 at 2^22. Of 16-bit numbers it rounds the product too.
FEW = 2**20


def scheduler_step(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    step: int | Tensor,
    *,
    noise: Tensor | None = None,
    clamp: float | None = None,
    threshold: tuple[float, float] | None = None,
    variance: Tensor | None = None,
    uncond: Tensor | None = None,
    guided: int = 1,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    dtypes: Sequence[torch.dtype] | None = None,
) -> tuple[Tensor, ...]:
    """One step of a sampler in one pass: up to three affine outputs of up to five inputs and noise.

    With the rows r of ``coefficients[step]``, inputs u_0 ... u_{n-1} and standard normal z:
    ``d = sum_j r[0][j] u_j + r[0][n+1] z``, which is limited, and ``out_k = sum_j r[1+k][j] u_j + r[1+k][n] d + r[1+k][n+1] z``.
    So d is the predicted data, say, and out_0 the sample of the next step. Every update that diffusion samplers take has this form:
    DDPM, DDIM, Euler, DPM-Solver, UniPC, flow matching, consistency models. What a coefficient of 0 multiplies is not looked at.

    Args:
        inputs: u, (B, ...) each, fp64, fp32, bf16 or fp16, which may be mixed: the sample, the model's output, and what the
            sampler keeps of former steps. Dense samples are read where they are; others are copied once.
        coefficients: (steps, 1 + outputs, n + 2), fp64. On the CPU where `step` is an int, whatever the inputs' device.
        step: which row; an int, or an int64 tensor on the inputs' device, () or (B,), which a captured graph may advance.
            A tensor's values are clamped into the table.
        noise: z as a tensor like inputs[0]; or a key, int64 (2,) or (B, 2), and then z is `philox_normal(shape, fold_in(key,
            step))` in fp32, never written to memory; one for each sample where `step` is. None: no noise, z = 0.
        clamp: d is clipped to [-clamp, clamp].
        threshold: (ratio, maximum), dynamic thresholding: with q the `ratio` quantile of |d| over a sample and
            m = min(max(q, 1), maximum), d becomes clip(d, -m, m) / m.
        variance: v in [-1, 1], like inputs[0], the learned range: z becomes z exp((l + (h - l) (v + 1) / 2) / 2), and coefficients
            has one row more, which begins with l and h, the logarithms of the least and of the greatest variance.
        uncond: like inputs[0]; inputs[guided] is then `guidance(inputs[guided], uncond, guidance_scale, guidance_rescale)`.
        dtypes: of the outputs; inputs[0]'s if None.

    Returns:
        The outputs, contiguous, of inputs[0]'s shape. Sums are made in fp32 (fp64 where a tensor is fp64) and rounded once.
        Differentiable once by every float tensor but coefficients, except with `threshold`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values of tensors never raise.

    NaN: of an element stays with that element; with `threshold` or a rescaled guidance it takes its sample.

    Source: the samplers' papers, named in mmgen_kernels/schedule/planner; Saharia et al. 2022 (dynamic thresholding); Nichol and
        Dhariwal 2021 (learned range).
    """
    check_inputs(inputs)
    first = inputs[0]
    outputs = check_coefficients(coefficients, step, inputs, variance is not None)
    z, key = split_noise(noise, "inputs[0]", first, step)
    check_limits(clamp, threshold)
    for name, tensor in (("variance", variance), ("uncond", uncond)):
        if tensor is not None:
            check_alike(name, tensor, "inputs[0]", first)
    if uncond is not None:
        check_finite("guidance_scale", guidance_scale)
        check_finite("guidance_rescale", guidance_rescale)
        if not 0 <= guided < len(inputs):
            raise ValueError(f"guided must name one of the {len(inputs)} inputs, got {guided}")
    else:
        guided = 0
    if first.dim() == 0 and (threshold is not None or (uncond is not None and guidance_rescale != 0)):
        raise ValueError("inputs[0] must be (B, ...) where a threshold or a rescaled guidance asks for samples, got a scalar")
    tensors = (*inputs, uncond, z, variance)
    if threshold is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("threshold has no derivative here: detach the inputs, or call under torch.no_grad()")
    index, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    ratio, maximum = threshold or (None, 1.0)
    dtype_0, dtype_1, dtype_2 = check_dtypes(dtypes, outputs, first)
    second, *more = padded(inputs[1:], INPUTS - 1)
    results = SCHEDULER_STEP(
        backends.choose(SCHEDULER_STEP, FAMILY, first.device.type),
        first, coefficients, number, dtype_0, second, dtype_1, *more, dtype_2, clamp, z, key, index, uncond, guided,
        float(guidance_scale), float(guidance_rescale), variance, ratio, float(maximum),
    )  # fmt: skip
    return results[:outputs]


def planned_step(
    inputs: Sequence[Tensor],
    coefficients: Tensor,
    step: int,
    dtypes: Sequence[torch.dtype],
    clamp: float | None = None,
    noise: Tensor | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`scheduler_step` by a table that a plan made, of tensors that the caller has compared: on a small sample the checks would
    take as long as the work."""
    second, *more = padded(inputs[1:], INPUTS - 1)
    dtype_1, dtype_2 = padded(dtypes[1:], MAX_OUTPUTS - 1)
    rest = () if clamp is None and noise is None and key is None else (clamp, noise, key)
    results = SCHEDULER_STEP(
        backends.choose(SCHEDULER_STEP, FAMILY, inputs[0].device.type),
        inputs[0], coefficients, step, dtypes[0], second, dtype_1, *more, dtype_2, *rest,
    )  # fmt: skip
    return results[: len(dtypes)]


def planned_pair(
    sample: Tensor, prediction: Tensor, coefficients: Tensor, step: int, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, ...]:
    """`planned_step` of two inputs and one or two outputs, which most steps are."""
    implementation = backends.choose(SCHEDULER_STEP, FAMILY, sample.device.type)
    if len(dtypes) == 1:
        return SCHEDULER_STEP(implementation, sample, coefficients, step, dtypes[0], prediction)[:1]
    return SCHEDULER_STEP(implementation, sample, coefficients, step, dtypes[0], prediction, dtypes[1])[:2]


def sums_alone(sample: Tensor, prediction: Tensor, dtype: torch.dtype) -> bool:
    """Whether `torch.add` may make sample + share prediction: one pass, as the operator's, which takes longer to call."""
    return (
        sample.dtype == prediction.dtype == dtype == torch.float32
        and sample.is_contiguous()
        and prediction.is_contiguous()
        and (sample.numel() <= FEW or sample.device.type != "cpu")
        and backends.told(FAMILY) is None
        and not torch.compiler.is_compiling()
    )


def padded(given: Sequence, count: int) -> list:
    return [*given, *[None] * (count - len(given))]


def guidance(cond: Tensor, uncond: Tensor, scale: float, *, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: ``g = uncond + scale (cond - uncond)``; rescaled, ``g (rescale std(cond) / std(g) + 1 - rescale)``.

    Args:
        cond, uncond: (B, ...), fp64, fp32, bf16 or fp16; the two halves of a doubled batch are read where they are.
        scale: 1 gives cond, 0 gives uncond.
        rescale: how much of the deviation that guidance adds to each sample is taken back; 0 takes none, 1 all. std is a sample's.

    Returns:
        Contiguous, of cond's shape and dtype. Differentiable once.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: of an element stays with that element; with rescale it takes its sample.

    Source: Ho and Salimans 2022; Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, section 3.4.
    """
    check_floats("cond", cond)
    check_alike("uncond", uncond, "cond", cond)
    check_finite("scale", scale)
    check_finite("rescale", rescale)
    if rescale != 0 and cond.dim() == 0:
        raise ValueError("cond must be (B, ...) where a rescale asks for samples, got a scalar")
    return GUIDANCE(backends.choose(GUIDANCE, FAMILY, cond.device.type), cond, uncond, float(scale), float(rescale))


def add_noise(
    x0: Tensor,
    noise: Tensor | None,
    t: Tensor,
    *,
    path: str = "vp",
    target: str = "epsilon",
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Noised data and what a model is trained to predict of it: ``x_t = a x0 + s z``, in one pass.

    Paths, with p = t, or p = table[t] where there is a table (time runs from data at 0 to noise at 1):
    linear ``a = 1 - p, s = p``; gvp ``a = cos(pi p / 2), s = sin(pi p / 2)``; edm ``a = 1, s = p``;
    vp by table ``a = sqrt(p), s = sqrt(1 - p)``, the table being alphas_cumprod;
    vp by time ``a = exp(-(19.9 p^2 / 4 + 0.1 p / 2)), s = sqrt(1 - a^2)``.
    Targets: epsilon ``z``; sample ``x0``; v ``a z - s x0``; flow ``x0 da/dp + z ds/dp``.

    Args:
        x0: (B, ...), fp64, fp32, bf16 or fp16.
        noise: z as a tensor like x0; or a key, int64 (2,) or (B, 2), and then z = philox_normal(x0.shape, key) in fp32.
            None draws a key from torch's generator.
        t: (B,), a float time, or an index into `table`, int64 or int32, clamped into it.
        path: vp, linear, gvp or edm.
        target: epsilon, sample, v (of vp and gvp) or flow.
        table: (S,), fp64 or fp32, on x0's device.

    Returns:
        (x_t, target), of x0's shape and dtype. Coefficients are made in fp64, so that the noise of small t is not lost in 16 bits.
        A target that is `noise` or `x0` is that very tensor, where no gradient is asked of it. Differentiable once by x0 and noise.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: stays with its element; a t that is NaN spoils its sample. What a share of 0 multiplies is not looked at.

    Source: Ho et al. 2020 (vp); Song et al. 2021 (vp in continuous time); Albergo and Vanden-Eijnden 2023, Ma et al. 2024 (linear,
        gvp); Karras et al. 2022 (edm); Salimans and Ho 2022 (v).
    """
    check_floats("x0", x0)
    if x0.dim() == 0:
        raise ValueError("x0 must be (B, ...), got a scalar")
    check_times(t, table, x0, path, target)
    if noise is None:
        noise = torch.randint(-(2**63), 2**63 - 1, (2,), device=x0.device)
    z, key = split_noise(noise, "x0", x0)
    if table is None:
        t = t if t.dtype in (torch.float32, torch.float64) else t.float()
    else:
        t, table = t.long(), table if table.dtype in (torch.float32, torch.float64) else table.float()
    as_given = {"sample": x0, "epsilon": z}.get(target)
    if as_given is not None and (as_given.dtype != x0.dtype or as_given.requires_grad):  # a gradient is to be rounded once
        as_given = None
    implementation = backends.choose(ADD_NOISE, FAMILY, x0.device.type)
    x_t, made = ADD_NOISE(implementation, x0, z, key, t, table, path, None if as_given is not None else target)
    return x_t, made if as_given is None else as_given


# -- registration -----------------------------------------------------------------------------------------------------

TENSORS = (*(f"input_{i}" for i in range(INPUTS)), "uncond", "noise", "variance")
# Those that few calls have come last: what is left out costs nothing on its way through Python.
ARGUMENTS = (
    "Tensor input_0, Tensor coefficients, SymInt step, ScalarType dtype_0, Tensor? input_1=None, ScalarType? dtype_1=None,"
    " Tensor? input_2=None, Tensor? input_3=None, Tensor? input_4=None, ScalarType? dtype_2=None, float? clamp=None,"
    " Tensor? noise=None, Tensor? key=None, Tensor? index=None, Tensor? uncond=None, int guided=0, float guidance_scale=1.0,"
    " float guidance_rescale=0.0, Tensor? variance=None, float? threshold=None, float threshold_max=1.0"
)
SAVED = (
    "Tensor input_0, " + ", ".join(f"Tensor? {name}" for name in TENSORS[1:]) + ", Tensor coefficients, Tensor? index, Tensor? key,"
    " SymInt step, int guided, float guidance_scale, float guidance_rescale, float? clamp"
)


def scheduler_step_fake(input_0, coefficients, step, dtype_0, input_1, dtype_1, *rest):
    dtypes = dtype_0, dtype_1, rest[3]
    return tuple(input_0.new_empty(0 if d is None else input_0.shape, dtype=d or dtype_0) for d in dtypes)


def scheduler_step_backward_fake(grad_0, grad_1, grad_2, *rest):
    tensors, needs = rest[: len(TENSORS)], rest[-1]
    given = zip(tensors, needs, strict=True)
    return tuple(rest[0].new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in given)


def add_noise_fake(x0, noise, key, t, table, path, target):
    return x0.new_empty(x0.shape), x0.new_empty(0 if target is None else x0.shape)


def add_noise_backward_fake(grad_x_t, grad_target, x0_shape, t, table, path, target, need_grad_x0, need_grad_noise):
    like = grad_target if grad_x_t is None else grad_x_t
    return tuple(like.new_empty(x0_shape if need else 0) for need in (need_grad_x0, need_grad_noise))


def launchers(name: str, **modules: str) -> dict[str, tuple[str, str] | str]:
    found = {i: f"mmgen_kernels.schedule.{m}:{name}" for i, m in (modules | {"triton": "triton_kernels"}).items()}
    return {implementation: (path, f"{path}_backward") for implementation, path in found.items()}


SCHEDULER_STEP = library.define(
    f"scheduler_step({ARGUMENTS}) -> (Tensor output_0, Tensor output_1, Tensor output_2)",
    reference=reference.scheduler_step,
    fake=scheduler_step_fake,
    backward=f"scheduler_step_backward(Tensor? grad_output_0, Tensor? grad_output_1, Tensor? grad_output_2, {SAVED},"
    f" bool[] needs) -> ({', '.join(f'Tensor grad_{name}' for name in TENSORS)})",
    backward_reference=reference.scheduler_step_backward,
    backward_fake=scheduler_step_backward_fake,
    launchers=launchers("scheduler_step", cuda="cuda"),
)

GUIDANCE = library.define(
    "guidance(Tensor cond, Tensor uncond, float scale, float rescale) -> Tensor guided",
    reference=reference.guidance,
    fake=lambda cond, uncond, scale, rescale: cond.new_empty(cond.shape),
    backward="guidance_backward(Tensor? grad_guided, Tensor cond, Tensor uncond, float scale, float rescale, bool need_grad_cond,"
    " bool need_grad_uncond) -> (Tensor grad_cond, Tensor grad_uncond)",
    backward_reference=reference.guidance_backward,
    backward_fake=lambda grad, cond, uncond, scale, rescale, *needs: tuple(
        t.new_empty(t.shape if need else 0) for t, need in zip((cond, uncond), needs, strict=True)
    ),
    launchers=launchers("guidance"),
)

ADD_NOISE = library.define(
    "add_noise(Tensor x0, Tensor? noise, Tensor? key, Tensor t, Tensor? table, str path, str? target)"
    " -> (Tensor x_t, Tensor target_value)",
    reference=reference.add_noise,
    fake=add_noise_fake,
    backward="add_noise_backward(Tensor? grad_x_t, Tensor? grad_target_value, SymInt[] x0_shape, Tensor t, Tensor? table, str path,"
    " str? target, bool need_grad_x0, bool need_grad_noise) -> (Tensor grad_x0, Tensor grad_noise)",
    backward_reference=reference.add_noise_backward,
    backward_fake=add_noise_backward_fake,
    launchers=launchers("add_noise"),
)
