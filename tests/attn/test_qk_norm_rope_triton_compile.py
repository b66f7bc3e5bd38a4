"""The Triton kernels of qk_norm_rope compiled ahead of time for three chips, without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmgen_kernels as mk

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SHARED = 48 * 1024  # bytes that a block has on every chip without asking
CHIPS = (80, 90, 100)
OF_HEADS = ("rms", "half_split", "layer", "partial", "no_angles", "only_angles")
# heads and their channels: SD3 and LTX as heads, DiT-XL/2, Lumina2, FLUX
HEADS = ((24, 64), (16, 72), (24, 96), (24, 128))
# Wan 1.3B, 5B and 14B; LTX's own angles for each head make it one head of 2048
ACROSS = ((12, 128), (24, 128), (40, 128), (1, 2048))


def assert_good_code(requests):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_qk_norm_rope.py")
    root = str(Path(mk.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, script, json.dumps(requests)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for request, kernels in zip(requests, map(json.loads, result.stdout.splitlines()), strict=True):
        sums = [] if request[0] == "only_angles" else ["sum_chunks"]
        assert [code["kernel"] for code in kernels] == ["norm_and_turn", "backward_chunks", *sums]
        for code in kernels:
            where = f"{request}: {code}"
            assert code["stack"] == 0 and code["spills"] == 0, where
            assert code["shared"] <= SHARED, where
            assert code["registers"] * 32 * code["warps"] <= 65536, where
            if code["kernel"] != "sum_chunks":  # rows are read 16 bytes at a time, those of 72 channels too
                assert code["ldg"] == 128 and code["stg"] >= 64, where


def test_compiles_without_spills():
    assert_good_code([["rms", 16, 72, "bfloat16", 90], ["across", 40, 128, "bfloat16", 90], ["layer", 24, 128, "float32", 80]])


@pytest.mark.long
@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("configuration", OF_HEADS)
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_norms_of_each_head_compile_without_spills(configuration, dtype, capability):
    assert_good_code([[configuration, heads, dim, dtype, capability] for heads, dim in HEADS])


@pytest.mark.long
@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("configuration", ("across", "across_layer"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_norms_across_heads_compile_without_spills(configuration, dtype, capability):
    assert_good_code([[configuration, heads, dim, dtype, capability] for heads, dim in ACROSS])
