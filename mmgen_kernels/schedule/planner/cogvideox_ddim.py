"""
CogVideoXDDIMScheduler, Yang et al. 2024: DDIM without noise, of sample and x0,

    x' = A x + (sqrt(a') - sqrt(a) A) x0        A = sqrt((1 - a') / (1 - a))

with a, a' alphas_cumprod at this timestep and the previous one. eta and what else `step` takes beside the tensors is read by
nobody, in diffusers too. Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import cogvideox, conversion
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.floats import div, sqrt
from mmgen_kernels.schedule.planner.forms import DERIVED, SAMPLE, matrix
from mmgen_kernels.schedule.planner.variance_preserving import check_signal, of_levels

TAKES = ("num_inference_steps", "begin")

schedule = cogvideox.schedule


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    kind, alphas, rows = config["prediction_type"], of_levels(levels), []
    for t in map(int, levels.timesteps[run.begin :]):
        a, to = alphas[t], cogvideox.previous(config, run, alphas, t)
        to = cogvideox.last(config, alphas) if to is None else to
        check_signal(a, kind, t)
        original = conversion.original(kind, *cogvideox.signal_and_noise(a), cogvideox.PREDICTIONS)
        carried = sqrt(div(1 - to, 1 - a))
        prev = carried * SAMPLE + (sqrt(to) - sqrt(a) * carried) * original
        rows.append(matrix(("sample", "model_output"), original, prev, DERIVED))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(False,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
    )
