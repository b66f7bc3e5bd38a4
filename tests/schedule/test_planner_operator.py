"""Plans carried out by the operator: recorded runs of diffusers, through mk.scheduler_step alone."""

import plan_executor
import pytest
import torch
from recorded_cases import SHAPE
from test_planner import RECORDS, levels_of, name

import mmgen_kernels as mk
from mmgen_kernels.schedule import planner
from mmgen_kernels.schedule.reference import INPUTS


def plan_of(record):
    return planner.plan(record["class"], record["config"], planner.Run(**record["run"]), levels=levels_of(record))


def used(plan, k):
    """The inputs that row k looks at, and the sample."""
    return [n for j, n in enumerate(plan.inputs) if n == "sample" or any(line[j] != 0 for line in plan.rows[k])]


def fits(record):
    plan = plan_of(record)
    return all(len(used(plan, k)) <= INPUTS for k in range(len(plan.rows)))


FITTING = [record for record in RECORDS if fits(record)]


def table(plan, names):
    """The operator's coefficients of these inputs: of a learned range it reads the logarithms in a row more."""
    rows = torch.tensor(plan.rows, dtype=torch.float64)  # (steps, 1 + outputs, inputs + 2)
    rows = rows[..., [*map(plan.inputs.index, names), -2, -1]]
    if plan.log_variance is None:
        return rows
    logs = torch.zeros_like(rows[:, :1])
    logs[:, 0, :2] = torch.tensor(plan.log_variance, dtype=torch.float64)
    return torch.cat([rows, logs], dim=1)


def step(plan, k, inputs, noise, variance=None):
    names = used(plan, k)
    outputs = mk.scheduler_step(
        [inputs[name] for name in names],
        table(plan, names),
        k,
        noise=noise if plan.draws_noise[k] else None,
        clamp=plan.clamp[1] if plan.clamp is not None else None,
        threshold=plan.threshold,
        variance=variance,
    )
    return dict(zip(plan.outputs, outputs, strict=True))


def test_all_fit_but_the_higher_orders_with_a_corrector():
    others = [record for record in RECORDS if record not in FITTING]
    assert {record["class"] for record in others} == {"UniPCMultistepScheduler", "SASolverScheduler"}
    for config in (record["config"] for record in others):
        assert max(config.get(order, 0) for order in ("solver_order", "predictor_order", "corrector_order")) > 2


@pytest.mark.parametrize("record", FITTING, ids=name)
def test_trajectory(record):
    plan = plan_of(record)
    channels = SHAPE[1] * (2 if plan.log_variance is not None else 1)
    steps = plan_executor.trajectory(plan, SHAPE, channels, apply=step)
    for ours, theirs in zip(steps, record["steps"], strict=True):
        for output, recorded in zip(ours.values(), theirs, strict=False):
            expected = torch.tensor([float(x) for x in recorded], dtype=torch.float64).view(SHAPE)
            assert (output - expected).abs().max() <= 1e-9 * expected.abs().max()
