"""
EDMEulerScheduler, Karras et al. 2022, algorithm 2 without its correction, for a network that is preconditioned as theirs (edm.py):

    xh = x + s_noise sqrt(sh^2 - s^2) z        sh as in euler.py
    x' = xh + (s' - sh) (xh - x0) / sh         x0 of xh and the model's output at sh, or what the caller says

`sigmas` are places between sigma_max at 0 and sigma_min at 1, not levels: so diffusers takes them. In diffusers sigmas are fp32, as
here, and so is all that comes of them, which is fp64 here. Outputs: prev_sample, pred_original_sample.
"""

from __future__ import annotations

import torch

from mmgen_kernels.schedule.planner import edm
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.euler import churned
from mmgen_kernels.schedule.planner.floats import div
from mmgen_kernels.schedule.planner.forms import DERIVED, MODEL_OUTPUT, matrix

TAKES = ("num_inference_steps", "sigmas", "begin", "s_churn", "s_tmin", "s_tmax", "s_noise", "has_original")


def schedule(config: Config, run: Run) -> Schedule:
    if (run.num_inference_steps is None) == (run.sigmas is None):
        raise ValueError(f"one of num_inference_steps and sigmas must be given, got {run.num_inference_steps} and {run.sigmas}")
    if run.sigmas is not None:
        ramp = torch.tensor([*run.sigmas], dtype=torch.float64, device="cpu")
    else:
        ramp = torch.linspace(0, 1, run.num_inference_steps or 0, dtype=torch.float64, device="cpu")
    return edm.schedule(config, ramp)


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    sigmas = sigma_space.of_levels(levels)
    rows, drawn, scales = [], [], []
    for i in range(run.begin, len(levels.timesteps)):
        x, hat = churned(run, sigmas, i)
        original = MODEL_OUTPUT if run.has_original else edm.denoised(config, x, hat)
        ratio = div(sigmas[i + 1] - hat, hat)
        rows.append(matrix(("sample", "model_output"), original, (1 + ratio) * x - ratio * original, DERIVED))
        drawn.append(hat > sigmas[i])
        scales.append(edm.scale(config, sigmas[i]))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample", "pred_original_sample"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=tuple(drawn),
        scale_model_input=tuple(scales),
    )
