"""`python -m benchmarks <family>`: races, bars and their records.

A whole run writes `results/<device>/<family>.json`, which the documentation quotes. A part of it (--quick, --shapes,
--contestants) writes below `results/partial/` instead, unless --out says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


def families() -> list[str]:
    """A family is a file here that declares cases."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\ndef cases(" in path.read_text())


def chosen(wanted: str | None, known: Sequence[str], what: str) -> list[str]:
    """The comma-separated names, in the order of `known`; an unknown one ends the program with what there is.

    A case is also known by what follows its group: `8192x1024x64` means that shape in each group that has it.
    """
    if wanted is None:
        return list(known)
    picked: set[str] = set()
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        matches = [each for each in known if name in (each, each.partition("/")[2])]
        if not matches:
            near = difflib.get_close_matches(name, [*known, *(each.partition("/")[2] for each in known)], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise SystemExit(f"unknown {what} {name!r}{hint}\nknown: {', '.join(known)}")
        picked.update(matches)
    return [name for name in known if name in picked]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Race a family against its rivals.")
    parser.add_argument("family", help=f"one of: {', '.join(families())}")
    parser.add_argument("--quick", action="store_true", help="a few cases, few rounds: does it work at all?")
    parser.add_argument("--shapes", help="comma-separated cases (see --list), with or without their group")
    parser.add_argument("--contestants", help="comma-separated names")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for everybody (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed work per case (default 10)")
    parser.add_argument("--rounds", type=int, default=7, help="at least (default 7)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--list", action="store_true", help="print cases and contestants, run nothing")
    parser.add_argument("--bars", action="store_true", help="evaluate the bars from the results, run nothing")
    options = parser.parse_args(arguments)
    options.family = chosen(options.family, families(), "family")[0]
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    return options


def progress_line(text: str) -> None:
    """Overwrites itself on a terminal; a log gets nothing but the tables."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def run(family: str, cases: Sequence, path: Path, stamp: dict, settings, device) -> int:
    """Races what is not yet in the file, and prints every case; 1 if a time was refused, 130 if interrupted."""
    from benchmarks import harness, plot, results, tables

    done = results.resumable(path, stamp)
    if path.exists() and not done:
        print("the results there are of other code or settings: beginning again", file=sys.stderr)
    try:
        for index, case in enumerate(cases):
            label = f"[{index + 1}/{len(cases)}] {case.name}: "
            if case.name not in done:
                progress = functools.partial(lambda label, text: progress_line(label + text), label)
                done[case.name] = harness.run_case(case, device, settings, family, progress)
                results.save(path, family, stamp, done)
            progress_line("")
            print(tables.case_table(case.name, done[case.name]), end="\n\n", flush=True)
    except KeyboardInterrupt:
        kept = f"{len(done)} cases are kept in {os.path.relpath(path)}"
        print(f"\ninterrupted; {kept}, the same command goes on from there", file=sys.stderr)
        return 130
    plot.draw(results.load(path), path.with_suffix(".png"))
    print(f"results: {os.path.relpath(path)}")
    return int(any("refused" in entry for case in cases for entry in done[case.name]["contestants"].values()))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # every OpenMP runtime in this process reads this when it is loaded, so it comes before the imports
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    from benchmarks import bars, harness, machine, memory, results

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    family = importlib.import_module(f"benchmarks.{options.family}")
    cases = {case.name: case for case in family.cases(device)}
    contestants = list(dict.fromkeys(entry.name for case in cases.values() for entry in case.contestants))
    if options.list:
        print("cases:", *cases, "contestants:", *contestants, sep="\n  ")
        return 0

    partial = options.quick or options.shapes is not None or options.contestants is not None
    folder = options.out or (results.RESULTS / "partial" if partial else results.RESULTS)
    path = folder / machine.slug(device, options.threads) / f"{options.family}.json"
    if options.bars:
        evaluated = family.bars(results.load(path).get("cases", {}))
        print(bars.describe(evaluated))
        return 0 if all(bar.passed for bar in evaluated) else 1

    quick_names = getattr(family, "QUICK_CUDA", family.QUICK) if device.type == "cuda" else family.QUICK
    names = quick_names if options.quick and options.shapes is None else chosen(options.shapes, list(cases), "shape")
    entered = chosen(options.contestants, contestants, "contestant")
    settings = harness.Settings(options.seconds, options.rounds, memory=not options.no_memory)
    if options.quick:
        quick = {"seconds": min(options.seconds, 1.0), "min_rounds": min(options.rounds, 3), "max_rounds": 10}
        settings = dataclasses.replace(settings, **quick)
    if device.type == "cuda":  # there no threads spin
        settings = dataclasses.replace(settings, quiet_seconds=0.0)
    if getattr(family, "KEEPS_FREED_MEMORY", False):
        memory.keep_freed_memory()
    settings = dataclasses.replace(settings, quiet_seconds=getattr(family, "QUIET_SECONDS", settings.quiet_seconds))
    stamp = machine.stamp(options.family, device, options.threads)
    stamp |= {"settings": dataclasses.asdict(settings), "contestants": entered}
    picked = [
        dataclasses.replace(cases[name], contestants=[one for one in cases[name].contestants if one.name in entered])
        for name in names
    ]
    return run(options.family, [case for case in picked if case.contestants], path, stamp, settings, device)


if __name__ == "__main__":
    raise SystemExit(main())
