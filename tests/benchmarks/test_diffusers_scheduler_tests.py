import inspect

import pytest
import torch

from tools import diffusers_scheduler_tests as tool

DDIM = "DDIMScheduler"


def record(counts, **outcomes):
    return {"outcomes": outcomes, "classes": {"a": DDIM, "b": DDIM, "c": "others"}, "counts": {DDIM: counts}}


def test_what_passes_with_stock_must_pass_with_ours():
    stock = record({"fused": 0}, a="passed", b="failed", c="passed")
    lines, good = tool.summary(stock, record({"fused": 99, "clipped otherwise": 1}, a="passed", b="failed", c="passed"))
    assert good and lines[1].split() == [DDIM, "1", "1", "100", "99.00%"] and "1: clipped otherwise" in lines[2]
    lines, good = tool.summary(stock, record({"fused": 100}, a="failed", b="passed", c="passed"))
    assert not good and lines[2].endswith("stock alone: a")
    assert not tool.summary(stock, record({"fused": 100}, a="passed", b="passed", c="skipped"))[1]


def test_most_steps_must_be_fused():
    passed = {"a": "passed", "b": "passed", "c": "passed"}
    lines, good = tool.summary(record({}, **passed), record({"fused": 94, "why": 6}, **passed))
    assert not good and "94.00%" in lines[1]


def test_the_subclass_passes_for_stock_and_counts():
    diffusers = pytest.importorskip("diffusers")
    counts = tool.collections.Counter(fused=0)
    ours = tool.with_our_step(diffusers.DDIMScheduler, counts)
    assert ours.__module__ == diffusers.DDIMScheduler.__module__ and ours.__name__ == DDIM
    assert inspect.signature(ours.step) == inspect.signature(diffusers.DDIMScheduler.step)
    a, b = ours(), diffusers.DDIMScheduler()
    x = torch.linspace(-2, 2, 48).view(1, 3, 4, 4)
    for scheduler in (a, b):
        scheduler.set_timesteps(5)
    t = b.timesteps[2]
    torch.testing.assert_close(a.step(x.sin(), t, x).prev_sample, b.step(x.sin(), t, x).prev_sample)
    assert counts == {"fused": 1}
    a.step(x.sin(), t, x.expand(2, 3, 4, 4))
    assert counts["fused"] == 1 and sum(counts.values()) == 2
