"""The bars that a family sets itself, evaluated from its results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """`reached` is None where the results cannot tell; that is no pass."""

    text: str
    reached: float | None
    needed: float
    upper: bool = False  # `needed` must not be reached
    why_unknown: str = "not measured"

    @property
    def passed(self) -> bool:
        if self.reached is None:
            return False
        return self.reached < self.needed if self.upper else self.reached >= self.needed


def believed_ms(results: Mapping[str, dict], case: str, contestant: str) -> tuple[float | None, str]:
    """The median time, or None and why: not run, skipped, or refused for wrong results."""
    entry = results.get(case, {}).get("contestants", {}).get(contestant)
    if entry is None:
        return None, "not measured"
    if "refused" in entry or "skipped" in entry:
        return None, f"{contestant}: {entry.get('refused') or entry['skipped']}"
    return entry["ms"][1], ""


def faster(results: Mapping[str, dict], case: str, ours: str, rival: str, times: float) -> Bar:
    """`ours` at least `times` as fast as `rival`."""
    own, why = believed_ms(results, case, ours)
    other, why_other = believed_ms(results, case, rival)
    reached = None if own is None or other is None else other / own
    return Bar(f"{case}: {ours} at least {times:g}x as fast as {rival}", reached, times, why_unknown=why or why_other)


def fastest(results: Mapping[str, dict], case: str, ours: str, rivals: Sequence[str]) -> Bar:
    """`ours` not slower than any of the rivals that ran."""
    own, why = believed_ms(results, case, ours)
    times = {name: ms for name in rivals if (ms := believed_ms(results, case, name)[0]) is not None}
    best = min(times, key=times.__getitem__, default="any rival")
    reached = times[best] / own if own is not None and times else None
    return Bar(f"{case}: {ours} not slower than {best}", reached, 1.0, why_unknown=why or "no rival ran")


def share(results: Mapping[str, dict], case: str, contestant: str, needed: float) -> Bar:
    """`contestant` reaches that share of the limit measured in the same run."""
    own, why = believed_ms(results, case, contestant)
    reached = None if own is None else results[case]["contestants"][contestant]["share_of_limit"]
    return Bar(f"{case}: {contestant} at {needed:.0%} of the FMA peak or more", reached, needed, why_unknown=why)


def below(text: str, reached: float | None, limit: float) -> Bar:
    return Bar(f"{text} below {limit:g}", reached, limit, upper=True)


def describe(bars: Sequence[Bar]) -> str:
    """One line per bar, misses first, and a count."""
    lines = []
    for bar in sorted(bars, key=lambda bar: (bar.passed, bar.reached is None)):
        state = "pass" if bar.passed else "MISS" if bar.reached is not None else "UNKNOWN"
        reached = bar.why_unknown if bar.reached is None else f"{bar.reached:.3g}"
        lines.append(f"{state:8}{bar.text}  [{reached}]")
    return "\n".join([*lines, f"{sum(bar.passed for bar in bars)} of {len(bars)} bars passed"])
