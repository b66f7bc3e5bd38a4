"""Discrete diffusion over codes: a step of VQ-Diffusion and its kin, and one of masked generation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_device, check_floats, check_number
from mmgen_kernels.philox.ops import checked_key
from mmgen_kernels.schedule.ops.checks import FAMILY, check_step
from mmgen_kernels.schedule.reference import discrete as reference


class UnmaskOutput(NamedTuple):
    """What `unmask_step` returns."""

    prev_sample: Tensor  # codes, int64 (B, N)
    pred_original_sample: Tensor  # codes, int64 (B, N)


def vq_diffusion_step(
    logits: Tensor,
    x_t: Tensor,
    transitions: Tensor,
    step: int | Tensor,
    *,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    dim: int = -1,
    return_log_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A draw of ``x_{t-1} ~ sum_{x0} q(x_{t-1} | x_t, x0) p(x0)``: a step of discrete diffusion with no tensor of logits' size.

    With ``p = softmax(logits / temperature)`` over K codes, the mask being class K, and a, b, c, A, B, C, A', B', C' of the row
    (`transition_table`), the weights v of the classes m are, where x_t is the mask, ``v_m = A' p_m + B'`` and ``v_K = C' / c``;
    where it is the code j, with ``k = A / (A + B)`` and ``S = 1 - k p_j``, ``v_m = b (A' p_m + B' S)``,
    ``v_j = (a + b) (A' (1 - k) p_j + B' S)`` and ``v_K = 0``. Where b = 0 a code stays what it is. The result is
    ``argmax_m v_m / E_m`` with standard exponentials E: Gumbel's argmax, ties to the lower class.

    Args:
        logits: (B, N, K), or (B, K, N) with dim=1, any strides, fp64, fp32, bf16 or fp16; log-probabilities are logits too.
        x_t: int64 (B, N), the present codes; clamped to 0 ... K.
        transitions: (steps, 9), fp64; on the CPU where `step` is an int, whatever the logits' device.
        step: which row; an int, or an int64 tensor on logits' device, () or (B,), which a captured graph may advance. Its values
            are clamped into the table.
        noise: a key, int64 (2,) or (B, 2), one for each sample where `step` is. E of class k at position n is then
            ``-ln((word + 1/2) / 2^32)`` of element ``n R + k`` of the stream of ``fold_in(key, step)``, with R = K + 1 rounded up
            to a multiple of 4; one key has the positions of all samples one after the other. Or E itself, a float tensor of
            logits' shape with K + 1 classes (Gumbel noise G is ``exp(-G)``). None draws a key from torch's generator.
        temperature: from 1e-30 to 1e30.
        dim: of logits and of E, the dimension of the classes: -1 or 1.
        return_log_prob: the logarithm of the drawn class's probability too.

    Returns:
        x_{t-1}, int64 (B, N), contiguous, and where asked for (B, N) log-probabilities, fp32 (fp64 of fp64 logits). A draw has no
        derivative, and is the same whatever the batch around it.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes; for a log-probability of logits that want a
            gradient. Values of tensors never raise.

    NaN: a position keeps x_t, its log-probability NaN, where softmax is not defined: logits with NaN or +Inf, or all -Inf. An E
        that is NaN never wins.

    Source: Gu et al. 2022 (VQ-Diffusion), equations 8 to 11; Austin et al. 2021 (D3PM).
    """
    logits = classes_last("logits", logits, dim)
    check_codes("x_t", x_t, logits)
    check_table("transitions", transitions, reference.ROW, step, logits)
    check_temperature(temperature)
    if return_log_prob and torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError("return_log_prob has no derivative here: detach logits, or call under torch.no_grad()")
    if noise is None:
        noise = random_key(logits, step)
    given, key = split_exponentials("noise", noise, logits, step)
    if given is not None:
        given = classes_last("noise", given, dim)
        check_shape("noise", given, (*x_t.shape, logits.shape[-1] + 1))
    index, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    implementation = backends.choose(VQ_DIFFUSION_STEP, FAMILY, logits.device.type)
    arguments = (logits, x_t, given, transitions, index, key, number, float(temperature), bool(return_log_prob))
    prev, log_prob = VQ_DIFFUSION_STEP(implementation, *arguments)
    return (prev, log_prob) if return_log_prob else prev


def unmask_step(
    logits: Tensor,
    sample: Tensor,
    schedule: Tensor,
    step: int | Tensor,
    *,
    mask_id: int,
    noise: Tensor | tuple[Tensor | None, Tensor] | None = None,
    temperature: float = 1.0,
    dim: int = -1,
) -> UnmaskOutput:
    """A step of masked generation: codes are drawn for all masked positions, and the least confident of them are masked again.

    With ``p = softmax(logits / temperature)``, each masked position draws ``code = argmax_k p_k / E_k``, and its confidence is
    ``ln p_code + heat G`` with ``G = -ln E_K``; (ratio, heat) is the row of the schedule (`masking_table`). Of the M masked
    positions of a sample ``min(max(1, min(M - 1, floor(N ratio))), M)`` are masked again, none where ratio is 0: exactly so many,
    the product being of fp32 numbers, and of equally confident ones the first. What was known stays.

    Args:
        logits: (B, N, K), or (B, K, N) with dim=1, any strides, fp64, fp32, bf16 or fp16.
        sample: int64 (B, N), codes and masks.
        schedule: (steps, 2), fp64; on the CPU where `step` is an int, whatever the logits' device.
        step: which row; an int, or an int64 tensor on logits' device, () or (B,). Its values are clamped into the table.
        mask_id: the code of a masked position, any int.
        noise: a key, int64 (2,) or (B, 2), whose numbers are those of `vq_diffusion_step`, element K being the confidence's. Or
            (E, E_K): float tensors of logits' shape, which temperature 0 does not need, and of (B, N). None draws a key.
        temperature: of the codes, from 1e-30 to 1e30; or 0, which takes the likeliest, with the confidence of temperature 1.
        dim: of logits and of E, the dimension of the codes: -1 or 1.

    Returns:
        UnmaskOutput(prev_sample, pred_original_sample): int64 (B, N), contiguous, after and before the masking. A draw has no
        derivative, and is the same whatever the batch around it.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values of tensors never raise.

    NaN: a position whose softmax is not defined (NaN or +Inf, or all -Inf) stays masked, and counts as the least confident. An E
        that is NaN never wins, and an E_K that is makes its position the least confident.

    Source: Chang et al. 2022 (MaskGIT), section 3.2; Patil et al. 2024 (Amused).
    """
    logits = classes_last("logits", logits, dim)
    check_codes("sample", sample, logits)
    check_table("schedule", schedule, 2, step, logits)
    check_temperature(temperature, or_none="0 or ")
    if not isinstance(mask_id, (int, torch.SymInt)) or isinstance(mask_id, bool):
        raise TypeError(f"mask_id must be an int, got {type(mask_id).__name__}")
    if noise is None:
        noise = random_key(logits, step)
    of_codes = of_confidence = key = None
    if isinstance(noise, tuple):
        if len(noise) != 2:
            raise ValueError(f"noise, where it is a tuple, must be (of codes, of confidences), got {len(noise)} of them")
        of_codes, of_confidence = noise
        if of_codes is not None:
            of_codes = classes_last("noise[0]", of_codes, dim)
            check_device("noise[0]", of_codes, "logits", logits)
            check_shape("noise[0]", of_codes, tuple(logits.shape))
        elif temperature != 0:
            raise TypeError("noise[0] must be a tensor where temperature is not 0, got NoneType")
        check_floats("noise[1]", of_confidence)
        check_device("noise[1]", of_confidence, "logits", logits)
        check_shape("noise[1]", of_confidence, tuple(sample.shape))
    else:
        of_confidence, key = split_exponentials("noise", noise, logits, step)
        if of_confidence is not None:
            raise TypeError("noise must be a key or (of codes, of confidences), got one float tensor")
    index, number = (step, 0) if isinstance(step, Tensor) else (None, step)
    implementation = backends.choose(UNMASK_STEP, FAMILY, logits.device.type)
    arguments = (logits, sample, of_codes, of_confidence, schedule, index, key, number, mask_id, float(temperature))
    return UnmaskOutput(*UNMASK_STEP(implementation, *arguments))


# -- checks -----------------------------------------------------------------------------------------------------------


def classes_last(name: str, tensor: Tensor, dim: int) -> Tensor:
    """(B, N, K), a view."""
    check_floats(name, tensor)
    if dim not in (-1, 1):
        raise ValueError(f"dim must be -1 or 1, got {dim}")
    if tensor.dim() != 3 or tensor.shape[dim] < 1:
        wanted = "(B, N, K)" if dim == -1 else "(B, K, N)"
        raise ValueError(f"{name} must be {wanted} with K >= 1, got shape {tuple(tensor.shape)}")
    return tensor if dim == -1 else tensor.transpose(1, 2)


def check_temperature(temperature: float, or_none: str = "") -> None:
    """Beyond, fp32 does not hold the inverse: 0 times a logit of -Inf would be NaN."""
    check_number("temperature", temperature)
    if not (1e-30 <= temperature <= 1e30 or (or_none and temperature == 0)):
        raise ValueError(f"temperature must be {or_none}from 1e-30 to 1e30, got {temperature}")


def check_codes(name: str, codes: Tensor, logits: Tensor) -> None:
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {getattr(codes, 'dtype', type(codes).__name__)}")
    check_shape(name, codes, tuple(logits.shape[:2]))
    check_device(name, codes, "logits", logits)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be of shape {shape}, classes last, got {tuple(tensor.shape)}")


def check_table(name: str, table: Tensor, columns: int, step: int | Tensor, logits: Tensor) -> None:
    if not isinstance(table, Tensor) or table.dtype != torch.float64:
        raise TypeError(f"{name} must be a float64 tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    if table.dim() != 2 or table.shape[1] != columns or table.shape[0] < 1:
        raise ValueError(f"{name} must be (steps, {columns}) with a step at least, got shape {tuple(table.shape)}")
    check_step(name, table, step, "logits", logits)


def split_exponentials(name: str, noise: Tensor, logits: Tensor, step: int | Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(numbers, key), one of which is None."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"{name} must be a tensor or a key, got {type(noise).__name__}")
    check_device(name, noise, "logits", logits)
    if noise.is_floating_point():
        return noise, None
    key = checked_key(noise)
    if tuple(key.shape) not in ((2,), (*logits.shape[:1], 2)):
        raise ValueError(f"{name}, where it is a key, must be (2,) or (B, 2) with B = {logits.shape[0]}, got {tuple(key.shape)}")
    if key.dim() == 1 and isinstance(step, Tensor) and step.dim() == 1:
        raise ValueError(f"{name}, where it is a key, must be one per sample (B, 2) where step is, got one for all")
    return None, key


def random_key(logits: Tensor, step: int | Tensor) -> Tensor:
    """One for all, or one for each sample where the step is."""
    shape = (*step.shape, 2) if isinstance(step, Tensor) else (2,)
    return torch.randint(-(2**63), 2**63 - 1, shape, device=logits.device)


# -- registration -----------------------------------------------------------------------------------------------------


TRITON = "mmgen_kernels.schedule.triton_kernels"


def vq_diffusion_step_fake(logits, x_t, noise, transitions, index, key, step, temperature, with_log_prob):
    wide = torch.float64 if torch.float64 in (logits.dtype, None if noise is None else noise.dtype) else torch.float32
    return x_t.new_empty(x_t.shape), logits.new_empty(x_t.shape if with_log_prob else 0, dtype=wide)


VQ_DIFFUSION_STEP = library.define(
    "vq_diffusion_step(Tensor logits, Tensor x_t, Tensor? noise, Tensor transitions, Tensor? index, Tensor? key, SymInt step,"
    " float temperature, bool with_log_prob) -> (Tensor prev_sample, Tensor log_prob)",
    reference=reference.vq_diffusion_step,
    fake=vq_diffusion_step_fake,
    launchers={"triton": f"{TRITON}:vq_diffusion_step"},
)

UNMASK_STEP = library.define(
    "unmask_step(Tensor logits, Tensor sample, Tensor? noise, Tensor? confidence_noise, Tensor schedule, Tensor? index,"
    " Tensor? key, SymInt step, SymInt mask_id, float temperature) -> (Tensor prev_sample, Tensor pred_original_sample)",
    reference=reference.unmask_step,
    fake=lambda logits, sample, *rest: (sample.new_empty(sample.shape), sample.new_empty(sample.shape)),
    launchers={"triton": f"{TRITON}:unmask_step"},
)
