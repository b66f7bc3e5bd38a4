"""Results files: one JSON per device and family, all of one stamp, written after every case.

A file never mixes two versions of the code or two settings. An interrupted run goes on where it stopped if the stamp is
still the same; otherwise the file is begun again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# What may differ between the parts of one file: committing documentation in between changes no time.
NOT_IDENTITY = ("commit", "date")


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, family: str, stamp: Mapping, cases: Mapping[str, dict]) -> None:
    """Written beside and moved into place: an interruption leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({"family": family, "stamp": dict(stamp), "cases": dict(cases)}, indent=1) + "\n")
    os.replace(partial, path)


def same_run(stamp: Mapping, other: Mapping) -> bool:
    keys = (stamp.keys() | other.keys()) - set(NOT_IDENTITY)
    return all(stamp.get(key) == other.get(key) for key in keys)


def resumable(path: Path, stamp: Mapping) -> dict[str, dict]:
    """The finished cases of the same stamp, and none of another."""
    held = load(path)
    return held["cases"] if held and same_run(stamp, held["stamp"]) else {}


def committed() -> list[tuple[str, dict]]:
    """(device folder, results) of every whole run, which documentation may quote; partial ones lie a folder deeper."""
    found = [(path.parent.name, load(path)) for path in sorted(RESULTS.glob("*/*.json"))]
    return [(folder, result) for folder, result in found if result.get("cases")]
