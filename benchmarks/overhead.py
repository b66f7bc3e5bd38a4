"""What a call costs before any work is done: `python -m benchmarks.overhead`, microseconds per call on a tiny input.

Writes `results/<device>/overhead.json`, and the table of docs/design.md from it; `--check` measures nothing and fails if
that table is not the file's. One thread. Every row takes turns with the others in rounds; a figure is the median over the
rounds, beside it the smallest.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable

import torch

import mmgen_kernels as mk
from benchmarks import machine
from benchmarks.results import RESULTS

PAGE = machine.ROOT / "docs" / "design.md"
BLOCK = re.compile(r"(<!-- overhead -->\n).*?(<!-- /overhead -->)", re.DOTALL)
ROWS, CODES, DIM = 4, 4, 4
ROUNDS, SECONDS_PER_ROUND = 25, 0.02


# One addition by the roads that registration could take.


class PlainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.add(a, b)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class ContextFunction(torch.autograd.Function):
    @staticmethod
    def forward(a, b):
        return torch.add(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    backward = PlainFunction.backward


@torch.library.custom_op("mmgen_overhead::add", mutates_args=())
def custom_add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.add(a, b)


custom_add.register_autograd(lambda ctx, grad: (grad, grad), setup_context=ContextFunction.setup_context)


def calls() -> dict[str, Callable[[], object]]:
    """Row -> what is timed."""
    x, codebook = torch.randn(ROWS, DIM), torch.randn(CODES, DIM)
    x_grad, codebook_grad = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    options = (None, 0.25, False, "straight_through", "l2", "exact")

    def backward(quantize: Callable) -> Callable[[], None]:
        def step() -> None:
            x_grad.grad = codebook_grad.grad = None
            quantize(x_grad, codebook_grad).loss.backward()

        return step

    def aten_backward() -> None:
        x_grad.grad = codebook_grad.grad = None
        torch.nn.functional.mse_loss(x_grad, codebook_grad).backward()

    def reference(function: Callable, *arguments: torch.Tensor) -> Callable:
        def call():
            with mk.use_backend("reference"):
                return function(*arguments)

        return call

    # as many fresh functions as rows: a compiled function is specialised on who calls it
    compiled_lookup = torch.compile(lambda a, b: mk.nearest_code(a, b), fullgraph=True)
    compiled_quantize = torch.compile(lambda a, b: mk.vector_quantize(a, b), fullgraph=True)
    return {
        "aten: torch.add": lambda: torch.add(x, codebook),
        "one addition by torch.library.custom_op, no gradient wanted": lambda: custom_add(x, codebook),
        "one addition, gradient wanted, forward: aten": lambda: torch.add(x_grad, codebook_grad),
        "... by autograd.Function, forward(ctx, ...)": lambda: PlainFunction.apply(x_grad, codebook_grad),
        "... by autograd.Function with setup_context": lambda: ContextFunction.apply(x_grad, codebook_grad),
        "... by torch.library.custom_op with register_autograd": lambda: custom_add(x_grad, codebook_grad),
        "aten: mse_loss, forward and backward": aten_backward,
        "raw torch.ops.mmgen_kernels.nearest_code": lambda: torch.ops.mmgen_kernels.nearest_code(x, codebook, None, "l2", "exact"),
        "mk.nearest_code": lambda: mk.nearest_code(x, codebook),
        "mk.nearest_code, reference": reference(mk.nearest_code, x, codebook),
        "mk.nearest_code, torch.compile": lambda: compiled_lookup(x, codebook),
        "raw torch.ops.mmgen_kernels.vector_quantize": lambda: torch.ops.mmgen_kernels.vector_quantize(x, codebook, *options),
        "mk.vector_quantize, no gradient wanted": lambda: mk.vector_quantize(x, codebook),
        "mk.vector_quantize, gradient wanted, forward": lambda: mk.vector_quantize(x_grad, codebook_grad),
        "raw torch.ops.mmgen_kernels.vector_quantize, gradient wanted, forward": lambda: torch.ops.mmgen_kernels.vector_quantize(
            x_grad, codebook_grad, *options
        ),
        "mk.vector_quantize, forward and backward": backward(mk.vector_quantize),
        "mk.vector_quantize, reference, no gradient wanted": reference(mk.vector_quantize, x, codebook),
        "mk.vector_quantize, torch.compile, no gradient wanted": lambda: compiled_quantize(x, codebook),
        "mk.vector_quantize, torch.compile, forward and backward": backward(compiled_quantize),
    }


def microseconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(times):
        call()
    return (time.perf_counter_ns() - start) / 1e3 / times


def measure() -> dict[str, dict[str, float]]:
    rows = calls()
    repeats = {}
    for name, call in rows.items():
        for _ in range(20):  # compiles, allocates, fills caches
            call()
        repeats[name] = max(1, int(SECONDS_PER_ROUND * 1e6 / microseconds(call, 20)))
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, call in rows.items():
            taken[name].append(microseconds(call, repeats[name]))
    return {name: {"median": round(statistics.median(t), 2), "smallest": round(min(t), 2)} for name, t in taken.items()}


def table(result: dict) -> str:
    stamp = result["stamp"]
    lines = ["| call | us, median | us, smallest |", "|---|---|---|"]
    lines += [f"| {name} | {us['median']:.1f} | {us['smallest']:.1f} |" for name, us in result["calls"].items()]
    versions = f"{stamp['device']}, one thread; torch {stamp['packages']['torch']}, Python {stamp['python']}; {stamp['date']}"
    shape = f"x ({ROWS}, {DIM}), codebook ({CODES}, {DIM}), fp32."
    return "\n".join(lines) + f"\n\n{versions}. {shape} Raw: `benchmarks/results/{result['folder']}/overhead.json`.\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="measure nothing; fail if the table is not the file's")
    options = parser.parse_args()
    device = torch.device("cpu")
    if not options.check:
        torch.set_num_threads(1)
        folder = machine.slug(device, 1)
        path = RESULTS / folder / "overhead.json"
        # `cases` is empty: this is no race, and benchmarks.report has nothing to draw of it
        stamp = machine.stamp("overhead", device, 1)
        result = {"family": "overhead", "folder": folder, "stamp": stamp, "cases": {}, "calls": measure()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    found = sorted(RESULTS.glob("*/overhead.json"))
    if not found:
        return 0
    text = PAGE.read_text()
    wanted = BLOCK.sub(lambda m: m[1] + table(json.loads(found[0].read_text())) + m[2], text)
    if options.check:
        if wanted != text:
            print(f"{PAGE.name}: the table of overheads is stale: run python -m benchmarks.overhead", file=sys.stderr)
        return int(wanted != text)
    PAGE.write_text(wanted)
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
