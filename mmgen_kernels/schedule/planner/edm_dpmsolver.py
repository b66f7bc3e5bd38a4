"""
EDMDPMSolverMultistepScheduler: DPM-Solver++ of orders 1 to 3 and its stochastic form (dpmsolver.py), on samples x0 + s z of a
network that is preconditioned as in edm.py, so that alpha is 1 and lambda = -log(s).

The stochastic form has no third order in diffusers, whose step fails where it would be due. In diffusers sigmas are fp32, as here;
lambda, h and all that comes of them are fp32 there, fp64 here. Derived is m0, which is x0, thresholded where asked. Outputs:
prev_sample, m0.
"""

from __future__ import annotations

import torch

from mmgen_kernels.schedule.planner import edm
from mmgen_kernels.schedule.planner import sigmas as sigma_space
from mmgen_kernels.schedule.planner.clipping import clip
from mmgen_kernels.schedule.planner.contract import Config, Plan, Run, Schedule
from mmgen_kernels.schedule.planner.dpmsolver import SOLVERS, SYNONYMS, greatest_order, update
from mmgen_kernels.schedule.planner.floats import log
from mmgen_kernels.schedule.planner.forms import DERIVED, SAMPLE, matrix
from mmgen_kernels.schedule.planner.solver_levels import Level
from mmgen_kernels.schedule.planner.variance_preserving import steps_of

TAKES = ("num_inference_steps", "begin")
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")


def schedule(config: Config, run: Run) -> Schedule:
    steps = steps_of(run, "EDMDPMSolverMultistepScheduler")
    return edm.schedule(config, torch.linspace(0, 1, steps, dtype=torch.float32, device="cpu"), config["sigma_min"])


def plan(config: Config, run: Run, levels: Schedule) -> Plan:
    algorithm = SYNONYMS.get(config["algorithm_type"], config["algorithm_type"])
    solver = SYNONYMS.get(config["solver_type"], config["solver_type"])
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm_type must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver_type must be one of {', '.join(SOLVERS)}, got {solver!r}")
    steps, sigmas = len(levels.timesteps), sigma_space.of_levels(levels)
    points = [Unscaled(sigma) for sigma in sigmas]
    inputs = ("sample", "model_output", "m1", "m2")[: 1 + min(max(config["solver_order"], 1), 3)]
    rows, scales = [], []
    for i in range(run.begin, steps):
        order = min(config["solver_order"], i - run.begin + 1, greatest_order(config, i, steps))
        if order == 3 and algorithm.startswith("sde"):
            raise ValueError("solver_order must be at most 2 for algorithm_type sde-dpmsolver++, got 3")
        near: list[Level] = [points[i + 1 - j] for j in range(order + 1)]  # the level to reach, this one, those before
        rows.append(matrix(inputs, edm.denoised(config, SAMPLE, sigmas[i]), update(algorithm, solver, near, DERIVED), DERIVED))
        scales.append(edm.scale(config, sigmas[i]))
    return Plan(
        inputs=inputs,
        outputs=("prev_sample", "m0"),
        rows=rows,
        schedule=levels,
        begin=run.begin,
        draws_noise=(algorithm.startswith("sde"),) * len(rows),
        scale_model_input=tuple(scales),
        feeds={"m1": "m0", "m2": "m1"} if len(inputs) == 4 else {"m1": "m0"} if len(inputs) == 3 else {},
        **clip(config),
    )


class Unscaled(Level):
    """sample = x0 + sigma noise."""

    def __init__(self, sigma: float) -> None:
        self.alpha, self.sigma, self.level, self.log_snr = 1.0, sigma, sigma, -log(sigma)
