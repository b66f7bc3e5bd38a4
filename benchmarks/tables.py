"""Results as text: one table per case on the terminal, one per group in the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def milliseconds(value: float) -> str:
    """Three significant figures and no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def mebibytes(entry: Mapping) -> str:
    return f"{entry['extra_bytes'] / 2**20:,.1f}" if "extra_bytes" in entry else "?"


def error_text(errors: Mapping[str, float]) -> str:
    """`0 wrong`, `27 wrong (0.17 %)`, `err 3e-07`, `1.006 ± 0.003 of ours`: what stands beside each time."""
    parts = []
    if "wrong" in errors:
        wrong = errors["wrong"]
        percent = 100 * wrong / max(1, errors["rows"])
        share = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
        parts.append(f"{wrong} wrong ({share} %)" if wrong else "0 wrong")
    if "error" in errors:
        parts.append(f"err {errors['error']:.0e}")
    if "times_ours" in errors:
        ratio = errors["times_ours"]
        parts.append(f"{ratio:.3f} ± {ratio * errors['standard_error']:.3f} of ours")
    return ", ".join(parts)


def outcome(entry: Mapping) -> str | None:
    """Why there is no time to show, or None."""
    return next((f"{key}: {entry[key]}" for key in ("skipped", "refused") if key in entry), None)


def rate(record: Mapping, ms: float) -> tuple[float, str]:
    work, unit = (record["bytes"], "GB/s") if record["limit"] == "copy_gb_s" else (record["flops"], "GFLOP/s")
    return work / ms / 1e6, unit


def rows_checked(record: Mapping) -> int | None:
    return next((e["errors"]["rows"] for e in record["contestants"].values() if "rows" in e.get("errors", {})), None)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def case_table(name: str, record: Mapping) -> str:
    """What the terminal shows after a case."""
    limit, source = record["limit"], record["limits"]["fma_source"]
    bound = record["limits"][limit]
    rows = [("", "ms", "quartiles", rate(record, 1.0)[1], "of limit", "extra MiB", "against fp64")]
    remarks = []
    for contestant, entry in record["contestants"].items():
        why = outcome(entry)
        if why is not None:
            remarks.append(f"  {contestant} {why}")
            continue
        low, middle, high = entry["ms"]
        rows.append(
            (
                contestant,
                milliseconds(middle),
                f"{milliseconds(low)}-{milliseconds(high)}",
                f"{rate(record, middle)[0]:.0f}",
                f"{entry['share_of_limit']:.0%}",
                mebibytes(entry),
                error_text(entry["errors"]),
            )
        )
    checked = rows_checked(record)
    head = f"{name}  {record['note']}  (limit {bound:.0f}, {limit}"
    head += f" by {source}" if limit == "fma_gflops" else ""
    head += f"; {checked} rows checked)" if checked is not None else ")"
    return "\n".join([head, align(rows), *remarks])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def group_table(cases: Mapping[str, dict]) -> str:
    """Markdown: a row per case, a column per contestant, each time with its error."""
    names = _contestants(cases)
    rows = []
    for name, record in cases.items():
        own = record["contestants"].get(names[0], {})
        part = f"{own['share_of_limit']:.0%}" if "share_of_limit" in own and outcome(own) is None else "-"
        rows.append([_title(name, record), *(_cell(record["contestants"].get(each)) for each in names), part])
    return markdown(["", *(f"{each}, ms" for each in names), f"{names[0]}: share of limit"], rows)


def memory_table(cases: Mapping[str, dict]) -> str:
    """Markdown: extra MiB per case and contestant."""
    names = _contestants(cases)
    rows = [
        [_title(name, record), *(_memory_cell(record["contestants"].get(each)) for each in names)]
        for name, record in cases.items()
    ]
    return markdown(["", *(f"{each}, MiB" for each in names)], rows)


def _contestants(cases: Mapping[str, dict]) -> list[str]:
    return list(dict.fromkeys(name for record in cases.values() for name in record["contestants"]))


def _title(name: str, record: Mapping) -> str:
    title = name.split("/", 1)[-1]
    return f"{title}<br>{record['note']}" if record["note"] else title


def _cell(entry: Mapping | None) -> str:
    if entry is None or "skipped" in entry:
        return "-"
    if "refused" in entry:
        return f"refused<br>{error_text(entry['errors'])}"
    return f"{milliseconds(entry['ms'][1])}<br>{error_text(entry['errors'])}"


def _memory_cell(entry: Mapping | None) -> str:
    return "-" if entry is None or outcome(entry) is not None else mebibytes(entry)
