"""What `python -m mmgen codes` came to: `python -m benchmarks.codes runs/codes` keeps its results and its picture.

Writes `results/<device>/codes.json`, `docs/codes.png` and the table of docs/codes.md; `--check` fails if that table is not the
file's.
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
from mmgen.evaluation.codes import Bits
from mmgen.tasks.codes import KINDS, Codes, Side, table

PAGE, PICTURE = machine.ROOT / "docs" / "codes.md", machine.ROOT / "docs" / "codes.png"
BLOCK = re.compile(r"(<!-- codes -->\n).*?(<!-- /codes -->)", re.DOTALL)


def read(result: dict) -> Codes:
    """The result as the task made it."""
    bits = ("test", "fresh_crops")
    sides = {
        kind: Side(**{name: Bits(**value) if name in bits else value for name, value in result[kind].items()}) for kind in KINDS
    }
    return Codes(**{name: value for name, value in result.items() if name != "settings"} | sides)


def text(held: dict) -> str:
    result, stamp = read(held["result"]), held["stamp"]
    heading, *rows = table(result)
    lines = [f"| {' | '.join(heading)} |", "|---|---:|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    training = held["result"]["settings"]["causal"]["training"]
    steps = f"{result.steps}" if result.steps == training["steps"] else f"the first {result.steps} of {training['steps']}"
    sides = [getattr(result, kind) for kind in KINDS]
    told = (
        f"Trained on {result.trained_tokens:,} codes each, {steps} steps of {training['batch_size']} crops; best on the held-out "
        f"photographs, and scored, after {each(sides, '{0.best_step}')} ({each(sides, '{0.held_out_bits:.3f}')} bits there). Test: "
        f"{result.test_pictures} tiles of {result.tokens_per_picture} codes, K = {result.codebook_size}, which the tokenizer "
        f"gives back at {result.test_psnr:.2f} dB. Bounds were drawn {result.replicates} times; ± is the standard error of "
        f"that. CPU seconds of forward and backward of a training step: {each(sides, '{0.cpu_seconds_per_step:.2f}')}; of a "
        f"picture: {each(sides, '{0.cpu_seconds_per_picture:.1f}')}, the latter two in {result.tokens_per_picture} steps."
    )
    where = f"{result.device}, {result.threads} thread{'s' if result.threads > 1 else ''}; torch {result.torch}; {stamp['date']}."
    return "\n".join(lines) + f"\n\n{told}\n\n{where} Raw: `benchmarks/results/{held['folder']}/codes.json`.\n"


def each(sides: list[Side], what: str) -> str:
    """`what` of each model, in the table's order."""
    *first, last = (what.format(side) for side in sides)
    return f"{', '.join(first)} and {last}"


def keep(run: Path) -> None:
    result = json.loads((run / "results.json").read_text())
    torch.set_num_threads(result["threads"])
    device = torch.device("cpu")
    folder = machine.slug(device, result["threads"])
    # `cases` is empty: this is no race, and benchmarks.report has nothing to draw of it
    held = {"family": "codes", "folder": folder, "stamp": machine.stamp("codes", device, result["threads"]), "cases": {}}
    path = RESULTS / folder / "codes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held | {"result": result}, indent=1) + "\n")
    shutil.copyfile(run / "codes.png", PICTURE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codes", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="the folder that mmgen codes has written; none: the committed results")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is not the file's")
    options = parser.parse_args()
    if options.run is not None and not options.check:
        keep(options.run)
    found = sorted(RESULTS.glob("*/codes.json"))
    if not found:
        return 0
    page = PAGE.read_text()
    wanted = BLOCK.sub(lambda match: match[1] + text(json.loads(found[0].read_text())) + match[2], page)
    if options.check:
        if wanted != page:
            print(f"{PAGE.name}: the table is stale: run python -m benchmarks.codes", file=sys.stderr)
        return int(wanted != page)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
