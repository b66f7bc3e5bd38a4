"""The command `mmgen-kernels`: info, check."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import mmgen_kernels
from mmgen_kernels import backends, battery

# In order, as far as the C++ part or what it may grow into can use them. Linux names.
CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve"),
)
VARIABLES = ("MMGEN_KERNELS_BACKEND", "MMGEN_KERNELS_CPU", "MMGEN_KERNELS_TRITON_ATTENTION")
OUR_DISTRIBUTION = "mmgen-kernels"
# PyPI's `mmgen` (OpenMMLab's MMGeneration) and `mmgen-wallet` install a package of the same name as ours.
FOREIGN_FILES = ("version.py", "apis", "core", "datasets", "ops", "cfg.py", "opts.py", "main.py", "proto", "tw")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status is 0 on success, 1 when a check fails, 2 on wrong arguments."""
    parser = argparse.ArgumentParser(prog="mmgen-kernels", description="Fused operations for multimodal generative models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,check}")
    commands.add_parser("info", help="versions, CPU, GPUs, what serves each operator and why the rest does not")
    check = commands.add_parser("check", help="run the correctness cases on a device; exit status 1 if one fails")
    check.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    check.add_argument("--family", choices=backends.FAMILIES, help="only this family of operators")
    check.add_argument("--quick", action="store_true", help="a few cases of each operator, in seconds")
    check.add_argument("--json", metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    if reason := reason_against_device(options.device):
        check.error(f"argument --device: {reason}")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        check.error(f"argument --json: {Path(options.json).parent} is not a directory")
    return run_check(options)


def reason_against_device(name: str) -> str | None:
    """Why the cases cannot run there, or None."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).cpu()  # lookups are defined in fp64
    except Exception as error:  # whatever a device's runtime raises; its first line says what is missing
        return f"{name!r} cannot be used: {str(error).splitlines()[0]}"
    return None


def run_check(options: argparse.Namespace) -> int:
    live = sys.stderr.isatty()

    def progress(number: int, total: int, name: str) -> None:
        if live:
            print(f"\r\x1b[K{number + 1}/{total} {name}", end="", file=sys.stderr, flush=True)
        elif number % 50 == 0:
            print(f"{number + 1}/{total} {name}", file=sys.stderr, flush=True)

    start = time.perf_counter()
    rows = battery.run(options.device, family=options.family, quick=options.quick, progress=progress)
    seconds = time.perf_counter() - start
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(table(rows))
    for row in rows:
        for failure in row.failures:
            print(f"FAILED {row.operator} {row.implementation} {row.dtype} {failure}")
    failed = sum(not row.passed for row in rows)
    verdict = f"{failed} of {len(rows)} rows failed" if failed else "all passed" if rows else "nothing to run"
    print(f"{sum(row.cases for row in rows)} cases in {seconds:.1f} s on {options.device}: {verdict}")
    if options.json:
        record = {
            "device": options.device,
            "torch": torch.__version__,
            "seconds": round(seconds, 3),
            # what raised has no error to speak of, and JSON has no infinity
            "rows": [
                asdict(r) | {"worst_error": r.worst_error if math.isfinite(r.worst_error) else None, "passed": r.passed}
                for r in rows
            ],
        }
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed or not rows else 0


HEADER = ("operator", "implementation", "dtype", "cases", "worst error", "repeatable", "result")


def table(rows: list[battery.Row]) -> str:
    lines = [HEADER] + [
        (
            *(r.operator, r.implementation, r.dtype, str(r.cases)),
            *(f"{r.worst_error:.1e}" if r.worst_error else "0", "yes" if r.repeatable else "NO", "pass" if r.passed else "FAIL"),
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def info() -> str:
    """Versions, machine, what was built, what serves, and what looks wrong."""
    lines = [
        "versions",
        f"  mmgen-kernels  {mmgen_kernels.__version__}",
        f"  python         {platform.python_version()}",
        f"  torch          {torch.__version__}",
        f"  triton         {version('triton')}",
        "cpu",
        f"  model          {cpu_model()}",
        f"  instructions   {' '.join(cpu_flags()) or 'unknown'}",
        f"  threads        {torch.get_num_threads()}",
        "environment",
        *[f"  {name:<30} {os.environ.get(name) or 'not set'}" for name in VARIABLES],
        "C++ part",
        *[f"  {line}" for line in cpp_part()],
        "GPUs",
        *[f"  {line}" for line in gpus()],
        "implementations",
        *[f"  {line}" for line in backends.backend_report().splitlines()],
        *[f"warning: {line}" for line in warnings()],
    ]
    return "\n".join(lines)


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpuinfo(*keys: str) -> str:
    """The first value in /proc/cpuinfo under one of `keys`, or nothing where there is no such file."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.strip()
    except OSError:
        pass
    return ""


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets of interest that this CPU has."""
    has = set(_cpuinfo("flags", "Features").split())
    return [flag for flag in CPU_FLAGS if flag in has]


def cpp_part() -> list[str]:
    """Built or not, with what, and why not."""
    facts, error = backends.build_facts(), backends.library_error()
    lines = [f"{name:<14} {facts[name]}" for name in ("torch", "compiler") if name in facts]
    return [f"loaded         {f'no: {error}' if error else 'yes'}", *lines]


def gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["none that torch can use" + ("" if torch.version.cuda else " (this torch is built without CUDA)")]
    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    return found


def warnings() -> list[str]:
    """What will go wrong sooner or later, in words that say what to do."""
    found = []
    if backends.library_error() and backends.build_facts().get("built"):
        found.append(f"the C++ part was built and does not load: {backends.library_error()}")
    if foreign := foreign_mmgen_files():
        found.append(
            f"the installed package `mmgen` holds files of another distribution ({', '.join(foreign)}). PyPI's `mmgen` and"
            " `mmgen-wallet` install a package of that name; uninstall them, then reinstall mmgen-kernels."
        )
    return found


def foreign_mmgen_files(package: Path | None = None) -> list[str]:
    """Distributions other than ours that own a package `mmgen`, and files in it that ours does not have."""
    owners = importlib.metadata.packages_distributions().get("mmgen", []) if package is None else []
    foreign = sorted({owner for owner in owners if owner.replace("_", "-").lower() != OUR_DISTRIBUTION})
    if package is None:
        spec = importlib.util.find_spec("mmgen")
        if spec is None or not spec.submodule_search_locations:
            return foreign
        package = Path(next(iter(spec.submodule_search_locations)))
    return foreign + [f"mmgen/{name}" for name in FOREIGN_FILES if (package / name).exists()]


if __name__ == "__main__":
    sys.exit(main())
