"""The tables of discrete diffusion: transitions between codes, and how many of them wait masked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice, check_number

MASKING_SCHEDULES = ("cosine", "linear")


def transition_table(alphas_cumprod: Tensor, num_codes: int, *, gammas_cumprod: Tensor | None = None) -> Tensor:
    """The transitions of a discrete diffusion, a row for each step, as `vq_diffusion_step` takes them.

    After t steps a code is what it was with probability ``A_t + B_t``, any other code with ``B_t`` and the mask with ``C_t``, where
    A is `alphas_cumprod`, C `gammas_cumprod` and ``B = (1 - A - C) / num_codes``. Step t alone has ``a = A_t / A_{t-1}``,
    ``1 - c = (1 - C_t) / (1 - C_{t-1})`` and ``b = (1 - a - c) / num_codes``, which is ``(B_t - a B_{t-1}) / (1 - C_{t-1})``. Entry
    0 is after the first step; a sampler that takes fewer steps than training picks the entries that it stops at.

    Args:
        alphas_cumprod: (T,), falling from nearly 1.
        num_codes: K, the mask not counted.
        gammas_cumprod: (T,), rising. None: 1 - alphas_cumprod, the absorbing diffusion, in which no code becomes another one; what
            differs from that by a rounding is taken for it. Zeros: the uniform diffusion, which has no mask.

    Returns:
        (T, 9), fp64, on the CPU: a, b, c, A_t, B_t, C_t, A_{t-1}, B_{t-1}, C_{t-1}.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.

    NaN: an entry's row and the next.

    Source: Gu et al. 2022, Vector Quantized Diffusion Model, section 4.1; Austin et al. 2021, Structured Denoising Diffusion Models
        in Discrete State-Spaces.
    """
    for name, values in (("alphas_cumprod", alphas_cumprod), ("gammas_cumprod", gammas_cumprod)):
        if values is None and name == "gammas_cumprod":
            continue
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
        if values.dim() != 1 or values.shape != alphas_cumprod.shape or len(values) < 1:
            raise ValueError(f"{name} must be (T,) with T >= 1, one for each step, got shape {tuple(values.shape)}")
    if not isinstance(num_codes, int) or isinstance(num_codes, bool) or num_codes < 1:
        raise ValueError(f"num_codes must be an int of at least 1, got {num_codes!r}")
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    kept = torch.cat((one, alphas_cumprod.detach().cpu().double()))  # (T + 1,)
    a = kept[1:] / kept[:-1]
    if gammas_cumprod is None:  # not by differences, whose rounding would let codes become others
        masked, c = 1 - kept, 1 - a
        replaced, b = torch.zeros_like(kept), torch.zeros_like(a)
    else:
        masked = torch.cat((zero, gammas_cumprod.detach().cpu().double()))
        c = 1 - (1 - masked[1:]) / (1 - masked[:-1])
        left = 1 - kept - masked
        rounding = max(torch.finfo(v.dtype).eps for v in (kept, alphas_cumprod, gammas_cumprod) if v.is_floating_point())
        replaced = torch.where(left.abs() <= rounding, 0, left).clamp(min=0) / num_codes
        b = ((replaced[1:] - a * replaced[:-1]) / (1 - masked[:-1])).clamp(min=0)  # of no B none: codes would all become others
    return torch.stack((a, b, c, kept[1:], replaced[1:], masked[1:], kept[:-1], replaced[:-1], masked[:-1]), 1)


def masking_table(
    num_steps: int,
    *,
    kind: str = "cosine",
    temperature: float | Sequence[float] = (2.0, 0.0),
    starting_mask_ratio: float = 1.0,
) -> Tensor:
    """How many positions wait masked after each step, and how much chance decides which, as `unmask_step` takes them.

    ``ratio = starting_mask_ratio cos(pi i / 2)`` or, linear, ``starting_mask_ratio (1 - i)`` with ``i = (step + 1) / num_steps``,
    and 0 after the last step.

    Args:
        num_steps: of the run.
        kind: cosine or linear.
        temperature: of the confidences, from the first step to the last in equal parts; a number goes down to 0.01.
        starting_mask_ratio: less than 1 where a run begins with some codes known.

    Returns:
        (num_steps, 2), fp64, on the CPU: ratio and temperature, which are fp32 numbers, as Amused has them.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.

    NaN: there is none.

    Source: Chang et al. 2022, MaskGIT: Masked Generative Image Transformer, section 3.3.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_steps must be an int of at least 1, got {num_steps!r}")
    check_choice("kind", kind, MASKING_SCHEDULES)
    first, last = temperature if isinstance(temperature, (tuple, list)) else (temperature, 0.01)
    for name, number in (("temperature", first), ("temperature", last), ("starting_mask_ratio", starting_mask_ratio)):
        check_number(name, number)
    done = torch.arange(1, num_steps + 1) / num_steps  # fp32
    ratio = starting_mask_ratio * (torch.cos(done * math.pi / 2) if kind == "cosine" else 1 - done)
    ratio[-1] = 0
    return torch.stack((ratio.double(), torch.linspace(first, last, num_steps).double()), 1)
