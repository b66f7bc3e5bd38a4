"""A step of a DiT script, stock and patched: every launch and wait counted, and the same numbers in less of them."""

import copy

import pytest
import torch

import mmgen_kernels as mk
from benchmarks import launches
from benchmarks.peers import dit_script


@pytest.fixture(scope="module")
def counts():
    return launches.counts(samples=4, size=(48, 2, 2))


def test_stock_is_counted_as_it_is(counts):
    """Nine copies of tables and of timesteps in a step of p_sample, thirteen in one of ddim_sample."""
    assert counts["p_sample"][0].count == launches.Count(large=35, small=counts["p_sample"][0].count.small, waits=9)
    assert counts["ddim_sample"][0].count.large == 61 and counts["ddim_sample"][0].count.waits == 13
    assert counts["losses, forward and backward"][0].count.waits == 20


@pytest.mark.parametrize("part", ("p_sample", "ddim_sample"))
def test_a_step_of_sampling_is_one_launch_beside_its_noise(counts, part):
    assert counts[part][1].names == {"randn_like": 1, "scheduler_step": 1}
    assert counts[part][1].count == launches.Count(large=2, small=0, waits=0)


def test_nothing_waits_and_less_is_launched(counts):
    for name, (stock, patched) in counts.items():
        assert patched.count.waits == 0, name
        assert patched.count.large + patched.count.small <= stock.count.large + stock.count.small, name
    stock, patched = (found.count for found in counts["losses, forward and backward"])
    assert stock.large + stock.small > 200 and patched.large + patched.small <= 16
    stock, patched = (found.count for found in counts["moving average"])
    assert stock.large + stock.small == 2 * len(list(dit_script.LatentDiT(48, 2, 2).parameters()))
    assert patched.large + patched.small == 1
    stock, patched = (found.count for found in counts["a training step"])
    assert stock.waits == 20 and patched.large + patched.small < 0.5 * (stock.large + stock.small)


def test_the_counter_sees_what_waits():
    device = launches.DEVICE
    x = torch.empty(64, device=device)
    sent = (lambda: torch.ones(3).to(device), lambda: torch.tensor([1, 2], device=device))
    seen = launches.counted(lambda: (x + 1, x[:2] * 2, x.view(8, 8), *(send() for send in sent)), 64)
    assert seen.count == launches.Count(large=1, small=1, waits=2)
    with pytest.raises(Exception, match="meta"):
        launches.counted(lambda: x.sum().item(), 64)


def test_steps_are_those_of_the_script():
    """Times, noise, losses, weights and their average over some steps, from the same seed."""
    x, y = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1), torch.arange(4)
    ends = []
    for patched in (False, True):
        parts = launches.script(patched, dit_script.LatentDiT(48, 2, 2, size=8))
        ema = copy.deepcopy(parts.model).requires_grad_(False)
        optimizer = torch.optim.SGD(parts.model.parameters(), lr=1e-3)
        torch.manual_seed(3)
        steps = [
            dit_script.training_step(parts.model, ema, optimizer, parts.diffusion, parts.update_ema, x, y) for _ in range(4)
        ]
        ends.append({"losses": torch.stack(steps), **dict(parts.model.named_parameters())})
        ends[-1] |= {f"average of {name}": average for name, average in ema.named_parameters()}
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()), msg=name)


def test_the_rules_are_verified_on_this_script():
    model, diffusion = dit_script.LatentDiT(48, 2, 2, size=8), launches.script_diffusion("250")
    handle = mk.patch([model, diffusion], strict=True)
    assert [r.kind for r in handle.replaced] == ["DiTBlock", "DiTBlock", "FinalLayer", "SpacedDiffusion"]
