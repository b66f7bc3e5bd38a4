"""The Triton kernels of joint_attention compiled ahead of time for three chips, without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_attention_triton_compile import MATRIX, SHARED

import mmgen_kernels as mk

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# Bytes a thread that are spilled with Triton 3.9, by kernel. They are right, and could be faster.
SPILLS = {
    (64, 80): {"joint_backward_queries": 8},
    (72, 80): {"joint_backward_queries": 48},
    (96, 80): {"joint_backward_queries": 48},
    (128, 80): {"joint_backward_keys": 24},
    (72, 100): {"joint_backward_keys": 8},
}


def assert_good_code(dim, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_joint_attention.py")
    root = str(Path(mk.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    request = json.dumps([[dim, "bfloat16", capability]])
    result = subprocess.run([sys.executable, script, request], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [code["kernel"] for code in found] == ["joint_forward", "joint_backward_queries", "joint_backward_keys"]
    known = SPILLS.get((dim, capability), {})
    assert {code["kernel"]: code["stack"] for code in found if code["stack"] or code["spills"]} == known
    for code in found:
        assert code["shared"] <= SHARED[capability], code
        assert MATRIX[capability] in code["instructions"], code
    if known:
        pytest.xfail(f"bytes a thread: {known}")


def test_compiles_without_spills():
    assert_good_code(128, 90)


@pytest.mark.long
@pytest.mark.parametrize("capability", (80, 90, 100))
@pytest.mark.parametrize("dim", (64, 72, 96, 128))
def test_each_chip_compiles_without_spills(dim, capability):
    assert_good_code(dim, capability)
