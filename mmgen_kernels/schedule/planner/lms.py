"""
LMSDiscreteScheduler, a linear multistep method of orders 1 to 4 (Adams and Bashforth, on uneven levels; Karras et al. 2022,
equation 1, is the equation that it integrates):

    x' = x + sum_k c_k d_k        d_k = (x - x0) / s of k steps ago, c_k = int_s^s' prod_(l != k) (t - s_l) / (s_k - s_l) dt

x0 is x - s m (epsilon), m (sample) or x / (s^2 + 1) - s m / sqrt(s^2 + 1) (v_prediction). The order is that of the step's place in
the schedule: a run that begins later has weights of derivatives that it lacks, which diffusers leaves out without a new weight for
the others, as here. diffusers has the weights of a quadrature of fp32 polynomials, here they are exact, in fp64; sigmas are fp32 in
both. Outputs: prev_sample, pred_original_sample, m0, which is the derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmgen_kernels.schedule.planner import conversion, spacing
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.euler import denoised
from mmgen_kernels.schedule.planner.floats import div, f32, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, SAMPLE, column, matrix
from mmgen_kernels.schedule.planner.variance_preserving import steps_of

TAKES = ("num_inference_steps", "begin", "order")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
GREATEST_ORDER = 4
NODE = math.sqrt(1 / 3)  # of Gauss and Legendre's rule of two points, exact for polynomials up to degree 3


def schedule(config: Config, run: Run) -> Schedule:
    steps = steps_of(run, "LMSDiscreteScheduler")
    sigmas, times = sigma_space.spaced(config, spacing.fractional(config, steps), steps)
    sigmas = [f32(sigma) for sigma in (*sigmas, 0.0)]
    return Schedule(tuple(f32(t) for t in times), "float32", tuple(sigmas), init_noise_sigma=sigma_space.start(config, sigmas))


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, sigmas = config["prediction_type"], sigma_space.of_levels(levels)
    conversion.check(kind, PREDICTIONS)
    if not 1 <= run.order <= GREATEST_ORDER:
        raise ValueError(f"order must be from 1 to {GREATEST_ORDER}, got {run.order}")
    inputs = ("sample", "model_output", "m1", "m2", "m3")[: 1 + run.order]
    rows, scales = [], []
    for i in range(run.begin, len(levels.timesteps)):
        s, order = sigmas[i], min(i + 1, run.order)
        original = denoised(kind, SAMPLE, s, s)
        derivatives = [(SAMPLE - original) / s, *(column(f"m{j}") for j in range(1, i - run.begin + 1))]
        prev = SAMPLE
        for j, derivative in enumerate(derivatives[:order]):
            prev = prev + coefficient(sigmas, order, i, j) * derivative
        rows.append(matrix(inputs, original, prev, DERIVED, derivatives[0]))
        scales.append(1 / sqrt(s**2 + 1))
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "pred_original_sample", "m0"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(False,) * len(rows),
        scale_model_input=tuple(scales),
        feeds={name: f"m{j}" for j, name in enumerate(inputs[2:])},
    )


def coefficient(sigmas: Sequence[float], order: int, i: int, j: int) -> float:
    """c_j of step i: what the derivative of j steps before weighs."""
    centre, half = (sigmas[i + 1] + sigmas[i]) / 2, (sigmas[i + 1] - sigmas[i]) / 2

    def basis(at: float) -> float:
        value = 1.0
        for k in range(order):
            if k != j:
                value *= div(at - sigmas[i - k], sigmas[i - j] - sigmas[i - k])
        return value

    return half * (basis(centre - NODE * half) + basis(centre + NODE * half))
