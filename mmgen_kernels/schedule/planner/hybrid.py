"""What `hybrid_loss` must know of each timestep, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice
from mmgen_kernels.schedule.planner.floats import div, log, sqrt

PREDICTIONS = ("epsilon", "sample", "v", "previous")
VARIANCES = ("learned_range", "learned", "fixed_small", "fixed_large")


@torch.inference_mode(False)  # autograd keeps it
def hybrid_table(betas: Tensor | Sequence[float], *, prediction: str = "epsilon", variance: str = "learned_range") -> Tensor:
    """The table of `hybrid_loss`, made once from the noise schedule.

    With alphas_t = 1 - betas_t, abar_t their product and B~_t = betas_t (1 - abar_{t-1}) / (1 - abar_t), a row is

    - the target's shares of x0 and of noise;
    - what multiplies target - prediction in the difference of the means of q(x_{t-1} | x_t, x0) and of the model;
    - the share of the predicted x0 in the model's mean, 0 where the model predicts the mean itself;
    - log B~_t, the first one being the second;
    - m and s: the logarithm of the model's variance is m + s v.

    Args:
        betas: (T,), T >= 1, in (0, 1]. What is not fp64 already is converted to it. A respaced process brings its own.
        prediction: epsilon, sample (x0), v, or previous (the mean of x_{t-1}).
        variance: learned_range, between log B~_t at v = -1 and log betas_t at 1; learned, v is the logarithm; fixed_small, B~_t;
            fixed_large, betas_t, the first one being B~_1.

    Returns:
        (T, 7), fp64, on the CPU. Move it to the device of the training once.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.

    NaN: in betas raises ValueError.

    Source: Ho et al. 2020, equations 6 and 7; Nichol and Dhariwal 2021, equation 15.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("variance", variance, VARIANCES)
    wide = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    if wide.dim() != 1 or len(wide) < 1:
        raise ValueError(f"betas must be (T,) with T >= 1, got shape {tuple(wide.shape)}")
    if not bool(((wide > 0) & (wide <= 1)).all()):
        raise ValueError(f"betas must be in (0, 1], got values from {float(wide.min()):g} to {float(wide.max()):g}")
    beta = wide.tolist()
    after = torch.cumprod(1 - wide, 0).tolist()  # abar_t
    before = [1.0, *after[:-1]]
    spread = [b * (1 - p) / (1 - a) for b, p, a in zip(beta, before, after, strict=True)]
    spread[0] = spread[1] if len(beta) > 1 else beta[0]
    rows = []
    for t, (b, p, a) in enumerate(zip(beta, before, after, strict=True)):
        of_predicted, of_x_t = b * sqrt(p) / (1 - a), (1 - p) * sqrt(1 - b) / (1 - a)
        data, noise = sqrt(a), sqrt(1 - a)
        target, factor = {
            "epsilon": ((0.0, 1.0), div(-b, noise * sqrt(1 - b))),
            "sample": ((1.0, 0.0), of_predicted),
            "v": ((-noise, data), -of_predicted * noise),
            "previous": ((of_predicted + of_x_t * data, of_x_t * noise), 1.0),
        }[prediction]
        low, high = log(spread[t]), math.log(b)
        middle, slope = {
            "learned_range": ((high + low) / 2, (high - low) / 2),
            "learned": (0.0, 1.0),
            "fixed_small": (low, 0.0),
            "fixed_large": (high if t > 0 else low, 0.0),
        }[variance]
        rows.append((*target, factor, 0.0 if prediction == "previous" else of_predicted, low, middle, slope))
    return torch.tensor(rows, dtype=torch.float64)
