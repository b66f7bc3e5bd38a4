"""What a family is asked on a machine with a GPU: `make gpu-check FAMILY=vq OUT=dir`, in one go and under 8 minutes.

Runs, each with a time limit and each whatever became of the one before: the family's tests that need a GPU,
`mmgen-kernels info` and `check`, and short races. Leaves the output of each and gpu-check-<family>.json in OUT. A machine
without a GPU is refused, so that nobody takes its results for those of one; --device cpu rehearses the run there.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def stages(family: str, device: str, out: Path) -> dict[str, tuple[int, list[str]]]:
    """name -> (seconds at most, command)"""
    # What needs no GPU was tested before the machine was had.
    tests = ["-m", "pytest", f"tests/{family}", "-m", "gpu and not long" if device == "cuda" else "not long and not gpu"]
    quick = ["--quick", "--no-memory", "--device", device, "--out", str(out)]
    races = [path.stem for path in sorted((ROOT / "benchmarks").glob(f"{family}*.py")) if "\ndef cases(" in path.read_text()]
    return {
        "info": (40, ["-m", "mmgen_kernels.cli", "info"]),
        "tests": (210 if device == "cuda" else 480, tests),
        "check": (80, ["-m", "mmgen_kernels.cli", "check", "--device", device, "--family", family]),
        **{f"race-{name}": (70, ["-m", "benchmarks", name, *quick]) for name in races},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if not (ROOT / "tests" / options.family).is_dir():
        parser.error(f"there is no family {options.family!r}: no tests/{options.family}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was checked (--device cpu rehearses the run)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    summary = {"family": options.family, "device": device_name, "torch": torch.__version__, "stages": {}}
    for name, (limit, command) in stages(options.family, options.device, options.out.resolve()).items():
        log, start = options.out / f"{name}.txt", time.perf_counter()
        with log.open("w") as file:
            try:
                done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
                code: int | str = done.returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {limit} s"
        lines = log.read_text().strip().splitlines() or [""]
        summary["stages"][name] = {"exit": code, "seconds": round(time.perf_counter() - start, 1), "last_line": lines[-1]}
        print(f"{name:<16} exit {code}: {lines[-1]}", flush=True)
        (options.out / f"gpu-check-{options.family}.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(stage["exit"] != 0 for stage in summary["stages"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
