"""
FlowMatchEulerDiscreteScheduler, a sample being (1 - s) x0 + s z and the model giving z - x0:

    x' = x + (s' - s) m
    x' = (1 - s') (x - s m) + s' z        with stochastic_sampling

In diffusers the training levels, and a caller's own `sigmas` and `timesteps` until they are shifted, are fp32, as here; evenly
spaced levels are fp64 until they are rounded to fp32 at the end. The step from one level to the next is fp32 there, fp64 here.
Derived is x0; the output is prev_sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen_kernels.schedule.planner import shift
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.forms import MODEL_OUTPUT, NOISE, SAMPLE, matrix
from mmgen_kernels.schedule.planner.spacing import linspace

TAKES = ("num_inference_steps", "timesteps", "sigmas", "mu", "shift", "begin", "s_churn", "s_tmin", "s_tmax", "s_noise")


def schedule(config: Config, run: Run) -> Schedule:
    n = config["num_train_timesteps"]
    counts = {len(given) for given in (run.sigmas, run.timesteps) if given is not None}
    if run.num_inference_steps is not None:
        counts.add(run.num_inference_steps)
    if len(counts) != 1:
        raise ValueError(
            "num_inference_steps, sigmas or timesteps must be given and agree in length, got "
            f"{run.num_inference_steps}, {run.sigmas} and {run.timesteps}"
        )
    steps = counts.pop()
    levels = _shifted(config, run, _unshifted(config, run, steps))
    respaced = sigma_space.respaced(config, levels[0].item(), levels[-1].item(), steps)
    sigmas = (levels if respaced is None else shift.column(respaced)).to(torch.float32)  # (steps,)
    times = sigmas * n if run.timesteps is None else shift.column([*run.timesteps], torch.float32)
    if config["invert_sigmas"]:
        sigmas = 1 - sigmas
        times = sigmas * n
    last = 1.0 if config["invert_sigmas"] else 0.0
    return Schedule(tuple(times.tolist()), "float32", (*sigmas.tolist(), last))


def _unshifted(config: Config, run: Run, steps: int) -> Tensor:
    n = config["num_train_timesteps"]
    if run.sigmas is not None:
        return shift.column([*run.sigmas], torch.float32)
    if run.timesteps is not None:
        return shift.column([*run.timesteps], torch.float32) / n
    table = torch.arange(1, n + 1, dtype=torch.float32, device="cpu") / n
    if not config["use_dynamic_shifting"]:
        table = shift.by_factor(table, config["shift"])
    return shift.column(linspace(table[-1].item() * n, table[0].item() * n, steps)) / n


def _shifted(config: Config, run: Run, sigmas: Tensor) -> Tensor:
    if config["use_dynamic_shifting"]:
        if run.mu is None:
            raise ValueError("mu must be given where use_dynamic_shifting is set, got None")
        sigmas = shift.dynamic(sigmas, config["time_shift_type"], run.mu)
    else:
        sigmas = shift.by_factor(sigmas, config["shift"] if run.shift is None else run.shift)
    return shift.to_terminal(sigmas, config["shift_terminal"]) if config["shift_terminal"] else sigmas


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    sigmas, rows = sigma_space.of_levels(levels), []
    for i in range(run.begin, len(levels.timesteps)):
        s, to = sigmas[i], sigmas[i + 1]
        original = SAMPLE - s * MODEL_OUTPUT
        prev = SAMPLE + (to - s) * MODEL_OUTPUT
        if config["stochastic_sampling"]:
            prev = (1 - to) * original + to * NOISE
        rows.append(matrix(("sample", "model_output"), original, prev))
    return Plan(
        inputs=("sample", "model_output"),
        outputs=("prev_sample",),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(bool(config["stochastic_sampling"]),) * len(rows),
        scale_model_input=(1.0,) * len(rows),
    )
