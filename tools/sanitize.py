"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`, `make sanitize ARGS="tests/vq -k heads"`.

Builds csrc a second time, in build/sanitized, where the rest of the project is links to itself, and runs pytest there on what
it is given, or on every case of the battery by the C++ implementation and on every instruction set that this CPU has. What the
sanitizers find ends the run with their report. GCC, on Linux.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mmgen_kernels"
NOT_LINKED = {".git", ".venv", "build", "dist", "runs", PACKAGE}
BATTERY = ["-m", "not gpu and not long", "-k", "cpp or instruction_sets", *(f"tests/{test}" for test in (
    "vq/test_cases.py", "modulation/test_modulation_cases.py", "attn/test_attention_cases.py", "blocks/test_blocks_cases.py",
    "philox/test_philox_cases.py", "schedule/test_schedule_cases.py"))]  # fmt: skip
BUILD = {"MMGEN_KERNELS_SANITIZE": "1", "MMGEN_KERNELS_BUILD": "1", "MMGEN_KERNELS_CUDA": "0", "MMGEN_KERNELS_PROBE": "0"}
OPTIONS = {  # torch and Python free little at their end, and have types of one name in several libraries
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def linked(folder: Path) -> None:
    """Makes the folder look like the project, but for what is built."""
    inner = folder / PACKAGE
    inner.mkdir(parents=True, exist_ok=True)
    for path in (*ROOT.iterdir(), *(ROOT / PACKAGE).iterdir()):
        link = folder / path.relative_to(ROOT)
        built = path.parent.name == PACKAGE and (path.suffix == ".so" or path.name in ("_build.json", "__pycache__"))
        if path.name not in NOT_LINKED and not built and not link.is_symlink():
            link.symlink_to(path)
    for link in (*folder.iterdir(), *inner.iterdir()):
        if link.is_symlink() and not link.exists():  # what the project no longer has
            link.unlink()


def runtime(name: str) -> str:
    """The compiler's own library: it has to be there before anything that it watches."""
    compiler = os.environ.get("CXX", "c++").split()
    return subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    folder = ROOT / "build" / "sanitized"
    linked(folder)
    environment = OPTIONS | os.environ | BUILD
    build = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=environment)
    if build.returncode:
        return build.returncode
    preloaded = " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so")))
    environment |= {"PYTHONPATH": str(folder), "LD_PRELOAD": preloaded}
    # a report does not go through Python's stderr
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *(arguments or BATTERY)]
    return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
