"""What the two runs of the demo came to, and how far they agree."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmgen.evaluation.memory import peak_memory
from mmgen.models import VQVAE

AGREEMENT_STEPS = 50  # over which the losses are compared: later, one other index has spread into everything
Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """One run."""

    steps_per_second: float
    quantizer_ms: float
    peak_memory: int | None  # bytes
    held_out_psnr: float
    held_out_usage: float
    held_out_perplexity: float
    window_usage: float
    window_perplexity: float


@dataclass(frozen=True)
class Comparison:
    stock: Side
    ours: Side
    first_different_step: int | None
    loss_disagreement: float  # largest relative difference over the first steps_compared steps
    steps_compared: int


def side(model: VQVAE, log: Log, tokens: int, device: torch.device) -> Side:
    scores = ("held_out_psnr", "held_out_usage", "held_out_perplexity", "window_usage", "window_perplexity")
    return Side(
        steps_per_second=1 / statistics.fmean(record["step_seconds"] for record in log),
        quantizer_ms=statistics.median(record["quantizer_ms"] for record in log),
        peak_memory=peak_memory(model.config, tokens, device=device, threads=torch.get_num_threads()),
        **{name: log[-1][name] for name in scores},
    )


def compare(stock: Side, ours: Side, stock_log: Log, our_log: Log) -> Comparison:
    pairs = list(zip(stock_log, our_log, strict=True))
    early = pairs[:AGREEMENT_STEPS]
    return Comparison(
        stock=stock,
        ours=ours,
        first_different_step=next((a["step"] for a, b in pairs if a["fingerprint"] != b["fingerprint"]), None),
        loss_disagreement=max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in early),
        steps_compared=len(early),
    )


def table(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Rows of what, stock, ours, and ours against stock; the first is the heading."""
    stock, ours = comparison.stock, comparison.ours
    speed = ours.steps_per_second / stock.steps_per_second
    quantizer = stock.quantizer_ms / ours.quantizer_ms
    psnr = ours.held_out_psnr - stock.held_out_psnr
    return [
        ("", "stock", "ours", "ours against stock"),
        ("steps/s", f"{stock.steps_per_second:.2f}", f"{ours.steps_per_second:.2f}", f"{speed:.2f}x"),
        ("quantizer, ms/step", f"{stock.quantizer_ms:.1f}", f"{ours.quantizer_ms:.1f}", f"{quantizer:.1f}x faster"),
        ("quantizer, peak memory", *memory(stock.peak_memory, ours.peak_memory)),
        ("held-out PSNR", f"{stock.held_out_psnr:.2f} dB", f"{ours.held_out_psnr:.2f} dB", f"{psnr:+.2f} dB"),
        ("held-out codebook usage", *shares(stock.held_out_usage, ours.held_out_usage)),
        ("held-out perplexity", *numbers(stock.held_out_perplexity, ours.held_out_perplexity)),
        ("training codebook usage", *shares(stock.window_usage, ours.window_usage)),
        ("training perplexity", *numbers(stock.window_perplexity, ours.window_perplexity)),
    ]


def memory(stock: int | None, ours: int | None) -> tuple[str, str, str]:
    if stock is None or ours is None:
        return "not told", "not told", "by this system"
    return f"{stock / 1e6:.1f} MB", f"{ours / 1e6:.1f} MB", f"{stock / ours:.0f}x less" if ours > 0 else ""


def shares(stock: float, ours: float) -> tuple[str, str, str]:
    return f"{stock:.1%}", f"{ours:.1%}", f"{100 * (ours - stock):+.1f} points"


def numbers(stock: float, ours: float) -> tuple[str, str, str]:
    return f"{stock:.0f}", f"{ours:.0f}", f"{ours - stock:+.0f}"


def as_text(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def agreement(comparison: Comparison) -> str:
    first = comparison.first_different_step
    indices = "the same at every step" if first is None else f"first different at step {first}"
    return (
        f"Indices of the two runs: {indices}. Losses of the first {comparison.steps_compared} steps agree within "
        f"{comparison.loss_disagreement:.1e} (relative)."
    )
