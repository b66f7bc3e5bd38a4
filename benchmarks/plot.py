"""One figure per results file: times on a logarithmic scale, a row per case, a mark per contestant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks import tables


def draw(results: Mapping, path: Path) -> bool:
    """Writes the figure; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cases = results["cases"]
    names = list(dict.fromkeys(name for record in cases.values() for name in record["contestants"]))
    figure = Figure(figsize=(9, 1.5 + 0.34 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        rows, middles, spreads = [], [], ([], [])
        for row, record in enumerate(cases.values()):
            entry = record["contestants"].get(name)
            if entry is not None and tables.outcome(entry) is None:
                low, middle, high = entry["ms"]
                rows.append(row + 0.06 * (index - len(names) / 2))  # side by side, so that equal times stay visible
                middles.append(middle)
                spreads[0].append(middle - low)
                spreads[1].append(high - middle)
        marker = "D" if name.startswith("ours") else "o"
        axes.errorbar(middles, rows, xerr=spreads, fmt=marker, markersize=4, linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), list(cases), fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_xlabel("milliseconds: median and quartiles")
    stamp = results["stamp"]
    axes.set_title(f"{results['family']} on {stamp['device']}, {stamp['threads']} threads", fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return True
