"""Timesteps against numpy's ranges, whose rounding decides them."""

import math

import numpy as np
import pytest

from mmgen_kernels.schedule import planner
from mmgen_kernels.schedule.planner import sigmas, spacing

TABLES = (40, 100, 700, 999, 1000)


@pytest.mark.parametrize("n", TABLES)
def test_ranges_are_numpys(n):
    for steps in range(1, n + 1):
        trailing = np.round(np.arange(n, 0, -n / steps)).astype(np.int64) - 1
        config = {"num_train_timesteps": n, "steps_offset": 0, "timestep_spacing": "trailing"}
        assert spacing.whole(config, steps) == trailing.tolist()
        even = np.linspace(0, n - 1, steps)
        assert spacing.linspace(0, n - 1, steps) == even.tolist()
        assert spacing.whole(config | {"timestep_spacing": "linspace"}, steps) == even.round()[::-1].astype(np.int64).tolist()


def test_trailing_may_end_in_minus_one():
    """1000 / (1000 / 61) is a little more than 61 in fp64: one more step, of the table's last entry, as in diffusers."""
    plan = planner.plan("DDIMScheduler", {"timestep_spacing": "trailing"}, planner.Run(num_inference_steps=61))
    assert len(plan.rows) == 62 and plan.timesteps[-2:] == (15, -1)
    assert plan.rows[-1][0][0] == pytest.approx(1 / math.sqrt(plan.schedule.alphas_cumprod[999]))


def test_interpolation_is_numpys():
    table = [0.1, 0.4, 0.9, 2.5]
    times = [-1.0, 0.0, 0.3, 1.0, 1.75, 2.999, 3.0, 3.5]
    assert sigmas.interpolate(times, table) == np.interp(times, range(4), table).tolist()


def test_time_of_a_level():
    table = [math.log(x) for x in (0.1, 0.4, 0.9, 2.5)]
    assert sigmas.time_of(math.log(0.2), table) == pytest.approx(0.5)
    assert [sigmas.time_of(math.log(x), table) for x in (0.05, 0.1, 0.4, 2.5, 9.0)] == pytest.approx([0, 0, 1, 3, 3])
