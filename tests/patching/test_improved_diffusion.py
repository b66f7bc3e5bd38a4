"""Our diffusion, and a patched one, against OpenAI's improved-diffusion itself.

    MMGEN_KERNELS_IMPROVED_DIFFUSION=<a checkout of openai/improved-diffusion> python -m pytest tests/patching
"""

import importlib
import itertools
import os
import sys
from pathlib import Path

import pytest
from test_diffusions import BETAS, LOSSES, MEANS, VARIANCES, assert_close, results

import mmgen_kernels as mk
from mmgen_kernels.patching import gaussian_diffusion_trial as trial
from mmgen_kernels.patching.gaussian_diffusion import METHODS
from mmgen_kernels.schedule.gaussian_diffusion import get_named_beta_schedule, space_timesteps

VARIABLE = "MMGEN_KERNELS_IMPROVED_DIFFUSION"
CHECKOUT = os.environ.get(VARIABLE)
pytestmark = pytest.mark.skipif(not CHECKOUT, reason=f"{VARIABLE} names no checkout of openai/improved-diffusion")


@pytest.fixture(scope="module")
def stock():
    """Its modules with the formulas and with respacing."""
    folder = Path(CHECKOUT)
    if not (folder / "improved_diffusion" / "gaussian_diffusion.py").exists():
        pytest.fail(f"{VARIABLE} must be a checkout of openai/improved-diffusion, got {folder}")
    sys.path.insert(0, str(folder))
    try:
        yield [importlib.import_module(f"improved_diffusion.{name}") for name in ("gaussian_diffusion", "respace")]
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("respacing", (None, "10", "ddim25"))
@pytest.mark.parametrize(("mean", "variance", "loss"), list(itertools.product(MEANS, VARIANCES, LOSSES)))
def test_the_same_numbers(stock, monkeypatch, mean, variance, loss, respacing):
    monkeypatch.setattr(trial, "_verified", set())
    formulas, respace = stock
    kinds = {
        "betas": BETAS,
        "model_mean_type": formulas.ModelMeanType[mean],
        "model_var_type": formulas.ModelVarType[variance],
        "loss_type": formulas.LossType[loss],
        "rescale_timesteps": loss.startswith("RESCALED"),
    }
    kept = None if respacing is None else space_timesteps(len(BETAS), respacing)
    diffusion = formulas.GaussianDiffusion(**kinds) if kept is None else respace.SpacedDiffusion(kept, **kinds)
    learned = variance.startswith("LEARNED")
    expected = results(diffusion, learned)
    assert_close(results(mk.GaussianDiffusion(use_timesteps=kept, **kinds), learned), expected)
    with mk.patch(diffusion, strict=True):
        assert vars(diffusion).keys() >= METHODS.keys()
        assert_close(results(diffusion, learned), expected)


def spaced(space, steps, counts):
    try:
        return space(steps, counts)
    except ValueError:
        return "refused"


@pytest.mark.parametrize("name", ("linear", "cosine"))
def test_schedules_and_spacing(stock, name):
    formulas, respace = stock
    assert abs(get_named_beta_schedule(name, 100).numpy() - formulas.get_named_beta_schedule(name, 100)).max() < 1e-15
    for steps in (100, 300, 1000, 4000):
        for counts in ("7", "25,10", "1,50,3", "ddim10", "ddim25", "100", [20, 30], "33"):
            assert spaced(space_timesteps, steps, counts) == spaced(respace.space_timesteps, steps, counts), (steps, counts)
