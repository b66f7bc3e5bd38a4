"""What whole runs in bf16 lose, against fp64 throughout, beside what diffusers' lose: with a perfect model of normal data."""

import pytest
import torch

from benchmarks import schedule
from benchmarks.peers import samplers, trajectories

pytest.importorskip("diffusers")
# whose stock steps compute in fp32 too, but for one product: of a single schedule either may end nearer to fp64
LEVEL = ("EDMEuler", "FlowMatchHeun", "FlowMatchEuler")


@pytest.mark.parametrize("name", [name for name in samplers.FURTHER if name not in LEVEL])
def test_a_run_in_16_bits_loses_less_than_diffusers(name):
    sampler = samplers.FURTHER[name]
    (start,) = schedule.draws((4, 16, 64, 64), torch.bfloat16, torch.device("cpu"), 1)
    truth = [trajectories.exact(sampler, start)]
    ours, stock = (
        schedule.error_of([trajectories.sampled(of(sampler), sampler, start)], truth) for of in (samplers.ours, samplers.stock)
    )
    assert ours < stock


@pytest.mark.parametrize("name", LEVEL)
def test_runs_of_all_lengths_lose_no_more_than_diffusers(name):
    losses = trajectories.Losses(schedule.RUNS[name], torch.bfloat16, torch.device("cpu"))
    ratios = losses.of(samplers.ours) / losses.of(samplers.stock)
    assert len(ratios) == 26 and trajectories.mean_of(ratios) < 1
    assert ratios.max() < 1.02


def test_the_ratio_of_errors_is_that_of_geometric_means_with_its_standard_error():
    ours, stock = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([2.0, 2.0, 8.0]).double()
    ratio = trajectories.mean_of(stock / ours)
    assert ratio == pytest.approx(4 ** (1 / 3)) and ratio == pytest.approx(trajectories.mean_of(stock) / trajectories.mean_of(ours))
    logs = torch.tensor([2.0, 1.0, 2.0]).log()
    assert trajectories.standard_error_of(stock / ours) == pytest.approx(logs.std().item() / 3**0.5)


@pytest.mark.parametrize("name", LEVEL)
def test_a_step_in_16_bits_loses_no_more_than_diffusers(name):
    """At every level, the same sample and model output for both."""
    generator, sampler = torch.Generator().manual_seed(0), schedule.RUNS[name]
    ours, exact, stock = samplers.ours(sampler), samplers.ours(sampler), samplers.stock(sampler)
    for scheduler in (ours, exact, stock):
        scheduler.set_timesteps(sampler.steps)
        scheduler.is_scale_input_called = True
    for k, t in enumerate(ours.timesteps):
        x, m = (torch.randn(2, 4, 32, 32, generator=generator).bfloat16() for _ in range(2))
        x = x * float((ours.sigmas[k] ** 2 + 0.25).sqrt())
        truth = exact.step(m.double(), exact.timesteps[k], x.double()).prev_sample
        found, theirs = (s.step(m, time, x).prev_sample for s, time in ((ours, t), (stock, stock.timesteps[k])))
        off = [(v.double() - truth).square().mean().sqrt().item() for v in (found, theirs)]
        assert off[0] <= off[1] * (1 + 1e-6)
