"""
FlowMatchLCMScheduler, consistency sampling of flows: a sample being (1 - s) x0 + s z and the model giving z - x0,

    x' = (1 - s') (x - s m) + s' z

over the levels of FlowMatchEulerDiscreteScheduler. With `scale_factors` x0 is resized between its two uses, which no row says: the
step's function does it. Derived is x0; the output is prev_sample.
"""

from __future__ import annotations

from mmgen_kernels.schedule.planner import flow_match
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.forms import DERIVED, MODEL_OUTPUT, NOISE, SAMPLE, matrix

TAKES = ("num_inference_steps", "timesteps", "sigmas", "mu", "shift", "begin")

schedule = flow_match.schedule


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    sigmas, rows = sigma_space.of_levels(levels), []
    for s, to in zip(sigmas[run.begin : len(levels.timesteps)], sigmas[run.begin + 1 :], strict=False):
        rows.append(matrix(("sample", "model_output"), SAMPLE - s * MODEL_OUTPUT, (1 - to) * DERIVED + to * NOISE))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample",),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(True,) * len(rows),
        scale_model_input=(1.0,) * len(rows),
    )
