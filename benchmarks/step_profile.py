"""Where the time of a DiT script's training step goes, stock and patched: `python -m benchmarks.step_profile --threads 1`.

By torch's profiler, in turns. Writes `results/<device>/step_profile.json` and the table of docs/gaussian-diffusion.md; `--check`
fails if that table is not the file's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import diffusion, machine, memory, tables
from benchmarks.results import RESULTS

PAGE = machine.ROOT / "docs" / "gaussian-diffusion.md"
BLOCK = re.compile(r"(<!-- step profile -->\n).*?(<!-- /step profile -->)", re.DOTALL)
PARTS = {
    "products with the weights": ("aten::mm", "aten::addmm"),
    "attention": (
        "mmgen_kernels::attention",
        "mmgen_kernels::attention_backward",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}
REST = "everything else, AdamW and the moving average among it"
WHO, ROUNDS = ("ours", "eager"), 5


def part_of(operator: str) -> str:
    return next((part for part, operators in PARTS.items() if operator in operators), REST)


def milliseconds(step: Callable) -> dict[str, float]:
    """Of one step, by part."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    spent = dict.fromkeys([*PARTS, REST], 0.0)
    for row in found.key_averages():
        spent[part_of(row.key)] += row.self_cpu_time_total / 1e3
    return spent


def measured(precision: str) -> dict[str, dict[str, float]]:
    """Of each contestant, the medians of `ROUNDS` steps."""
    case = diffusion.training_case(precision, torch.device("cpu"))
    given = case.inputs(False)["data"]
    steps = {c.name: c.make(*given) for c in case.contestants if c.name in WHO}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(2 + ROUNDS):  # the first two warm up
        for name, step in steps.items():
            spent = milliseconds(step)
            if turn > 1:
                rounds[name].append(spent)
    return {name: {part: torch.tensor([r[part] for r in of]).median().item() for part in of[0]} for name, of in rounds.items()}


def text(held: dict) -> str:
    heading, rows = ["ms of a step"], [[part] for part in [*PARTS, REST, "together"]]
    told = []
    for precision, result in held["result"].items():
        for who in WHO:
            heading.append(f"{who}, {precision}")
            spent = [*result[who].values()]
            for row, value in zip(rows, [*spent, sum(spent)], strict=True):
                row.append(f"{value:.0f}")
        eager, products = sum(result["eager"].values()), result["ours"]["products with the weights"]
        told.append(
            f"{precision}: nothing but the products would be {eager / products:.2f} times as fast as eager, with our attention "
            f"{eager / (products + result['ours']['attention']):.2f} times."
        )
    stamp = held["stamp"]
    threads = f"{stamp['threads']} thread{'s' if stamp['threads'] > 1 else ''}"
    where = f"{stamp['device']}, {threads}; torch {stamp['packages']['torch']}; {stamp['date']}."
    raw = f"Raw: `benchmarks/results/{held['folder']}/step_profile.json`."
    return f"{tables.markdown(heading, rows)}\n\n{' '.join(told)}\n\n{where} {raw}\n"


def keep(threads: int) -> None:
    torch.set_num_threads(threads)
    memory.keep_freed_memory()
    folder = machine.slug(torch.device("cpu"), threads)
    result = {precision: measured(precision) for precision in diffusion.STEP_CASES}
    # no `cases`: this is no race, and benchmarks.report has nothing to draw of it
    held = {"family": "step_profile", "folder": folder, "stamp": machine.stamp("diffusion", torch.device("cpu"), threads)}
    path: Path = RESULTS / folder / "step_profile.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held | {"result": result}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, metavar="N", help="measure on so many; none: only the table of what is committed")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is not the file's")
    options = parser.parse_args(arguments)
    if options.threads is not None and not options.check:
        keep(options.threads)
    (path,) = RESULTS.glob("*/step_profile.json")
    page = PAGE.read_text()
    wanted = BLOCK.sub(lambda match: match[1] + text(json.loads(path.read_text())) + match[2], page)
    if options.check:
        if wanted != page:
            print(f"{PAGE.name}: the table is stale: run python -m benchmarks.step_profile", file=sys.stderr)
        return int(wanted != page)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
