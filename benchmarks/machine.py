"""What a result depends on besides the code: device, instruction set, versions, threads, and the sources' identity."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "numpy",
    "faiss-cpu",
    "scikit-learn",
    "vector-quantize-pytorch",
    "flashlib",
    "flash-kmeans",
)


def device_name(device: torch.device) -> str:
    """The processor's or GPU's own name; never the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def slug(device: torch.device, threads: int) -> str:
    """A folder name: `intel-xeon-processor-2-threads`, `nvidia-h200`."""
    name = re.sub(r"\((?:r|tm)\)|\bcpu\b|@.*$", " ", device_name(device).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if device.type == "cuda" else f"{name}-{threads}-thread{'s' if threads > 1 else ''}"


def instruction_sets() -> list[str]:
    """The widest vector and matrix instructions that this CPU offers."""
    offered = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_fp16") if offered.get(name)]


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else 4 * 2**30


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, with `-dirty` if the tree differs from it."""
    done = subprocess.run(
        ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "uncommitted"


def sources_digest(family: str) -> str:
    """Identity of what is timed and of how, built extension included: a dirty tree has one too."""
    digest = hashlib.sha256()
    kernels = [path for path in (ROOT / "mmgen_kernels").rglob("*") if path.suffix in (".py", ".so", ".pyd")]
    timing = [ROOT / "benchmarks" / name for name in ("harness.py", "limits.py", "memory.py", f"{family}.py")]
    for path in sorted([*kernels, *timing, *(ROOT / "benchmarks" / "peers").glob("*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def stamp(family: str, device: torch.device, threads: int) -> dict:
    return {
        "device": device_name(device),
        "instruction_sets": instruction_sets() if device.type == "cpu" else [],
        "threads": threads,
        "python": platform.python_version(),
        "packages": package_versions(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": commit(),
        "sources": sources_digest(family),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
