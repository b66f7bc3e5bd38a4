"""
CogVideoXDPMScheduler, Yang et al. 2024: DPM-Solver++ of the second order with noise, whose history the caller keeps. With lambda =
log(a / (1 - a)) / 2 at this timestep, h to where the step leads and r h from where the last one began,

    x' = A x - sqrt(a') expm1(-2 h) ((1 + 1 / 2r) x0 - x0_old / 2r) + sqrt(1 - a') sqrt(-expm1(-2 h)) z
    A  = sqrt((1 - a') / (1 - a)) exp(-h)

and x0 alone without history and in the last step. diffusers draws noise once more before that of a step with history, for a result
that it throws away. eta and what else `step` takes is read by nobody. "m1" is x0_old. Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import cogvideox, conversion
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, exp, expm1, log, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, NOISE, SAMPLE, column, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_signal, of_levels

TAKES = ("num_inference_steps", "begin")

schedule = cogvideox.schedule


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, alphas, rows = config["prediction_type"], of_levels(levels), []
    times = [int(t) for t in levels.timesteps]
    for i in range(run.begin, len(times)):
        t = times[i]
        a, to = alphas[t], cogvideox.previous(config, run, alphas, t)
        with_history = i > run.begin and to is not None
        to = cogvideox.last(config, alphas) if to is None else to
        check_signal(a, kind, t)
        h, data = log_snr(to) - log_snr(a), DERIVED
        if with_history:
            share = div(h, 2 * (log_snr(a) - log_snr(alphas[times[i - 1]])))
            data = (1 + share) * DERIVED - share * column("m1")
        prev = sqrt(div(1 - to, 1 - a)) * exp(-h) * SAMPLE - sqrt(to) * expm1(-2 * h) * data
        prev = prev + sqrt(1 - to) * sqrt(-expm1(-2 * h)) * NOISE
        original = conversion.original(kind, *cogvideox.signal_and_noise(a), cogvideox.PREDICTIONS)
        rows.append(matrix(("sample", "model_output", "m1"), original, prev, DERIVED))
    return Plan(
        inputs=("sample", "model_output", "m1"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(True,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
        feeds={"m1": "pred_original_sample"},
    )


def log_snr(a: float) -> float:
    return log(sqrt(div(a, 1 - a)))
