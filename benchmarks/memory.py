"""Peak memory that a contestant needs beyond its inputs.

On a CPU each contestant runs in a process of its own, so nobody inherits another's warm allocator: inputs are built,
a tiny call loads the code and starts the threads, the kernel's high-water mark of resident memory is reset, and one
call at full size shows the rest (outputs included). What compiles does so at full size, so there the second call is
read. On CUDA the allocator counts for itself.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.harness import Case, Contestant

# glibc raises its mmap threshold as blocks are freed, and then keeps freed blocks: pinned, they go back to the system
# and a peak is a peak of live blocks.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def keep_freed_memory() -> None:
    """glibc gives a large block back to the system when it is freed, and a call that returns new tensors then spends up to half its
    time on page faults. A process that keeps them is what a training step is in from its second iteration on.
    """
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_threshold, largest = -1, -3, 32 * 2**20  # 32 MiB: the largest that glibc takes
        libc = ctypes.CDLL(None)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, largest)


def extra_bytes(family: str, case: Case, contestant: Contestant, device: torch.device) -> dict:
    """`{"extra_bytes": ...}`, or `{"memory_unknown": reason}`."""
    if device.type == "cuda":
        return {"extra_bytes": _on_cuda(case, contestant)}
    if not Path("/proc/self/clear_refs").exists():
        return {"memory_unknown": "this system cannot reset its high-water mark"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", family, case.name, contestant.name],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return {"memory_unknown": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return {"extra_bytes": json.loads(done.stdout.splitlines()[-1])}


def _on_cuda(case: Case, contestant: Contestant) -> int:
    call = contestant.make(*case.inputs(False)[contestant.inputs])
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest since the reset)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024


def on_cpu(case: Case, contestant: Contestant) -> int:
    """To be called once in a fresh process."""
    contestant.make(*case.inputs(True)[contestant.inputs])()
    call = contestant.make(*case.inputs(False)[contestant.inputs])
    if contestant.compiles:
        call()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    output = call()  # kept alive: the result is part of the peak
    peak = _resident_bytes("VmHWM") - before
    del output
    return max(peak, 0)


def main(family: str, case_name: str, contestant_name: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cases = importlib.import_module(f"benchmarks.{family}").cases(torch.device("cpu"))
    case = next(case for case in cases if case.name == case_name)
    contestant = next(entry for entry in case.contestants if entry.name == contestant_name)
    print(json.dumps(on_cpu(case, contestant)))


if __name__ == "__main__":
    main(*sys.argv[1:])
