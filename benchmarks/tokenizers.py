"""What `python -m mmgen tokenizers` came to: `python -m benchmarks.tokenizers runs/tokenizers` keeps its results and its picture.

Writes `results/<device>/tokenizers.json`, `docs/tokenizers.png` and the table of docs/tokenizers.md; `--check` fails if that table
is not the file's.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.results import RESULTS
from mmgen.tasks.tokenizers import markdown

PAGE, PICTURE = machine.ROOT / "docs" / "tokenizers.md", machine.ROOT / "docs" / "tokenizers.png"
BLOCK = re.compile(r"(<!-- tokenizers -->\n).*?(<!-- /tokenizers -->)", re.DOTALL)


def text(held: dict) -> str:
    result = held["result"]
    stamp, training = result["stamp"], result["settings"]["training"]
    seeds = len(next(iter(result["scores"].values())))
    minutes = training["steps"] * seeds * sum(result["cpu_seconds_per_step"].values()) / 60
    told = (
        f"{training['steps']} steps of {training['batch_size']} crops; the discriminator learns from step "
        f"{training['disc_start'] - training['disc_warmup']} on and is heard from step {training['disc_start']} on. All "
        f"{seeds * len(result['scores'])} trainings together: {minutes:.0f} minutes of one core."
    )
    threads = f"{stamp['threads']} thread{'s' if stamp['threads'] > 1 else ''}"
    where = f"{stamp['device']}, {threads}; torch {stamp['torch']}; {stamp['date']}."
    return f"{markdown(result)}\n{told}\n\n{where} Raw: `benchmarks/results/{held['folder']}/tokenizers.json`.\n"


def keep(run: Path) -> None:
    result = json.loads((run / "tokenizers.json").read_text())
    threads = result["stamp"]["threads"]
    torch.set_num_threads(threads)
    folder = machine.slug(torch.device("cpu"), threads)
    path = RESULTS / folder / "tokenizers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # no `cases`: this is no race, and benchmarks.report has nothing to draw of it
    path.write_text(json.dumps({"family": "tokenizers", "folder": folder, "result": result}, indent=1) + "\n")
    shutil.copyfile(run / "tokenizers.png", PICTURE)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizers", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="the folder that mmgen tokenizers has written; none: what is committed")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is not the file's")
    options = parser.parse_args(arguments)
    if options.run is not None and not options.check:
        keep(options.run)
    (path,) = RESULTS.glob("*/tokenizers.json")
    page = PAGE.read_text()
    wanted = BLOCK.sub(lambda match: match[1] + text(json.loads(path.read_text())) + match[2], page)
    if options.check:
        if wanted != page:
            print(f"{PAGE.name}: the table is stale: run python -m benchmarks.tokenizers", file=sys.stderr)
        return int(wanted != page)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
