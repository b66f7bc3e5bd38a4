"""What a family is asked on a machine with a GPU: `make gpu-check FAMILY=vq OUT=dir WHEELS=dir`, in one go, under 8 minutes.

Runs, each with a time limit and each whatever became of the one before: `mmgen-kernels info`, the family's tests that need
a GPU, `mmgen-kernels check --quick`, and short races. Leaves two files in OUT: gpu-check-<family>.json, which holds the
races' results too, and gpu-check-<family>.txt, what everything printed. A machine without a GPU is refused, so that nobody
takes its results for those of one; --device cpu rehearses the run there.

Rivals that the machine lacks can be brought along without a network: the wheels of --wheels are importable in the races.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# What `make` builds before this comes on top, and all together is to stay below 8 minutes.
SECONDS = 390
NO_TESTS = 5  # pytest's exit status where none was selected: a family whose kernels need no test of their own on a GPU


def unpack(wheels: Path, folder: Path) -> dict[str, str]:
    """Unpacks the wheels of a folder into another: project -> version. ValueError names a wheel that cannot be trusted."""
    folder = folder.resolve()
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    place = (folder / name).resolve()
                    if not place.is_relative_to(folder):
                        raise ValueError(f"{wheel.name}: {name!r} lies outside of the folder it is unpacked into")
                    if place.is_file():
                        raise ValueError(f"{wheel.name}: {name!r} is in another wheel too")
                archive.extractall(folder)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel.name}: {error}") from error
    return {found.metadata["Name"]: found.version for found in metadata.distributions(path=[str(folder)])}


def described(wheels: Path | None, versions: dict[str, str]) -> str:
    if versions:
        return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    if wheels is None:
        return "none: no folder was named"
    return f"none: {wheels} {'is empty of them' if wheels.is_dir() else 'is not there'}"


def stages(family: str, device: str, results: Path) -> dict[str, tuple[int, list[str]]]:
    """name -> (seconds at most, command)"""
    # What needs no GPU was tested before the machine was had; without a GPU these tests are collected and skipped.
    tests = ["-m", "pytest", f"tests/{family}", "-m", "gpu and not long"]
    quick = ["--quick", "--no-memory", "--device", device, "--out", str(results)]
    if device == "cpu":
        quick += ["--rounds", "1", "--seconds", "0"]  # a rehearsal: some rivals take seconds a call there
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    races = [path.stem for path in files if path.stem == family or path.stem.startswith(f"{family}_")]
    races = [name for name in races if "\ndef cases(" in (ROOT / "benchmarks" / f"{name}.py").read_text()]
    return {
        "info": (40, ["-m", "mmgen_kernels.cli", "info"]),
        "tests": (170, tests),
        # All cases take minutes, on a CPU alone already.
        "check": (80, ["-m", "mmgen_kernels.cli", "check", "--quick", "--device", device, "--family", family]),
        **{f"race-{name}": (100 if device == "cuda" else 180, ["-m", "benchmarks", name, *quick]) for name in races},
    }


def run(command: list[str], limit: float, path: list[str], log: Path) -> dict:
    """One stage: how it ended, how long it took, its last line. What it prints goes to the end of the log."""
    environment = os.environ | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})
    start = time.perf_counter()
    with log.open("a") as file:
        begin = file.tell()
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            )
            code: int | str = done.returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines() or [""]
    return {"exit": code, "seconds": round(time.perf_counter() - start, 1), "last_line": lines[-1]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the races can import; may be empty or missing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all stages together (default {SECONDS})")
    options = parser.parse_args(arguments)
    if not (ROOT / "tests" / options.family).is_dir():
        parser.error(f"there is no family {options.family!r}: no tests/{options.family}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was checked (--device cpu rehearses the run)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("wheels", "results")}
        try:
            versions = unpack(options.wheels, folders["wheels"]) if options.wheels else {}
        except ValueError as error:
            parser.error(f"--wheels: {error}")
        return check(options, folders, versions)


def check(options: argparse.Namespace, folders: dict[str, Path], versions: dict[str, str]) -> int:
    """Runs the stages. The summary is written after each, so that whoever is stopped has what was done."""
    options.out.mkdir(parents=True, exist_ok=True)
    log, report = (options.out / f"gpu-check-{options.family}.{suffix}" for suffix in ("txt", "json"))
    wheels = {"said": described(options.wheels, versions), "versions": versions}
    print(f"wheels: {wheels['said']}", flush=True)
    log.write_text(f"wheels: {wheels['said']}\n")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    summary = {"family": options.family, "device": device, "torch": torch.__version__, "wheels": wheels, "stages": {}, "races": {}}
    given = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    passed, end = True, time.perf_counter() + options.seconds
    for name, (limit, command) in stages(options.family, options.device, folders["results"]).items():
        left = end - time.perf_counter()
        with log.open("a") as file:
            file.write(f"\n==== {name}: python {' '.join(command)}\n")
        if left < 1:
            stage = {"exit": "not run: no time left", "seconds": 0.0, "last_line": ""}
        else:
            path = [str(folders["wheels"]), *given] if versions and name.startswith("race-") else given
            stage = run(command, min(limit, left), path, log)
        passed &= stage["exit"] == 0 or (name == "tests" and stage["exit"] == NO_TESTS)
        summary["stages"][name] = stage
        for results in folders["results"].glob(f"*/{name.removeprefix('race-')}.json"):  # cases that were finished, at least
            summary["races"][results.stem] = json.loads(results.read_text())
        print(f"{name:<16} exit {stage['exit']}: {stage['last_line']}", flush=True)
        report.write_text(json.dumps(summary, indent=1) + "\n")
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
