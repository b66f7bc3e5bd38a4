"""The Triton kernels of the family compiled ahead of time for three chips, without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmgen_kernels as mk

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CHIPS = (80, 90, 100)
SHARED = 48 * 1024  # bytes that a block has on every chip without asking
STEPS = (
    "ddim", "ddim_fp32", "ddim_fp64", "ddim_mixed", "ddim_odd", "ddim_clamp", "ancestral_noise", "ancestral_key", "ancestral_keys",
    "ancestral_key_odd", "on_device", "on_device_clamp", "on_device_full", "full", "full_fp32", "learned", "learned_on_device",
)  # fmt: skip
STATISTICS_FIRST = ("rescale", "guidance_rescale")
NOISES = (
    "noise_linear_flow", "noise_gvp_v", "noise_edm_sample", "noise_vp_flow", "noise_vp_epsilon", "noise_index", "noise_index_key",
    "noise_key", "noise_key_odd", "noise_fp64",
)  # fmt: skip
LAUNCHES = dict.fromkeys((*STEPS, "guidance"), ("take_step",)) | dict.fromkeys(NOISES, ("noise_samples",))
LOSSES = ("loss_mse", "loss_huber", "loss_smooth_l1", "loss_pseudo_huber", "loss_fp64", "loss_mask", "loss_mixed", "loss_odd")
HYBRIDS = ("hybrid", "hybrid_fp32", "hybrid_fp64", "hybrid_mixed", "hybrid_kl", "hybrid_kl_clamp", "hybrid_fixed", "hybrid_odd")
LAUNCHES |= dict.fromkeys(LOSSES, ("lose", "lose_samples", "average", "slope_of_loss"))
DRAWS = (
    "diffuse", "diffuse_fp32", "diffuse_fp64", "diffuse_codes_first", "diffuse_codes_first_fp64", "diffuse_on_device",
    "diffuse_noise", "unmask", "unmask_fp64", "unmask_codes_first", "unmask_likeliest", "unmask_noise",
)  # fmt: skip
LAUNCHES |= dict.fromkeys(DRAWS, ("draw_codes",))
BOUNDS = ("bound", "bound_fp32", "bound_fp64", "bound_codes_first", "bound_codes_first_fp64", "bound_on_device")
LAUNCHES |= dict.fromkeys(BOUNDS, ("lose_places", "lose_places"))
LAUNCHES |= {"loss_fp32": ("lose", "lose_samples", "slope_of_loss")}
LAUNCHES |= dict.fromkeys(HYBRIDS, ("lose_terms", "lose_hybrid", "slope_of_terms"))
LAUNCHES |= dict.fromkeys(STATISTICS_FIRST, ("add_up", "take_step")) | {"threshold": ("take_step", "take_step")}
# samples that begin anywhere are read element by element
ODD = ("ddim_odd", "ancestral_key_odd", "noise_key_odd", "loss_odd", "hybrid_odd")
OF_PLACES = ("lose_places",)  # a dozen numbers in fp64 for each place
OF_SAMPLES = ("lose_samples", "lose_hybrid", "average")  # which read a number or two of each piece


def compiled(requests):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_schedule.py")
    root = str(Path(mk.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, script, json.dumps(requests)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return zip(requests, map(json.loads, result.stdout.splitlines()), strict=True)


def assert_good_code(requests):
    found = {}
    for (name, capability), kernels in compiled(requests):
        assert tuple(code["kernel"] for code in kernels) == LAUNCHES[name]
        for code in kernels:
            where = f"{name} for sm_{capability}: {code}"
            assert code["stack"] == code["spills"] == 0, where
            assert code["shared"] <= SHARED and code["registers"] <= (255 if code["kernel"] in OF_PLACES else 128), where
            assert name in ODD or code["kernel"] in OF_SAMPLES or code["widest_load"] >= 128, where
        found[name, capability] = kernels
    return found


def test_compiles_without_spills():
    """16 bytes a load, no spills; and noise brings no contraction, which would change its bits."""
    found = assert_good_code([["ancestral_key", 90], ["ancestral_noise", 90], ["on_device", 80], ["guidance_rescale", 100],
                             ["loss_pseudo_huber", 80], ["hybrid", 90], ["hybrid_kl_clamp", 80],
                             ["diffuse", 90], ["unmask_codes_first", 80], ["bound", 90], ["bound_codes_first", 80]])
    from_key, from_tensor = (found[name, 90][0]["fp32_fused"] for name in ("ancestral_key", "ancestral_noise"))
    assert from_key == from_tensor > 0


@pytest.mark.long
@pytest.mark.parametrize("capability", CHIPS)
def test_every_configuration_compiles_without_spills(capability):
    assert_good_code([[name, capability] for name in LAUNCHES])
