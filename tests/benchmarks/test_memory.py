"""Peak memory counts what a call holds at once, and neither its inputs nor what it gave back before."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from benchmarks import memory
from benchmarks.harness import Case, Contestant

def make(x):
    def call():
        for _ in range(3):
            x + 1  # freed before the next one: 16 MiB at a time
        return x + x  # 16 MiB that stay
    return call

case = Case("add", "add", (), lambda tiny: {"data": (torch.ones(2**10 if tiny else 2**22),)}, None, 0, 0, "copy_gb_s")
print(memory.on_cpu(case, Contestant("add", make)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs a resettable high-water mark")
def test_peak_of_a_known_call():
    from benchmarks import memory

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).resolve().parents[2],
        env={**memory.os.environ, **memory.ALLOCATOR, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 16 <= int(done.stdout) / 2**20 < 20
