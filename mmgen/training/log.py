"""The log of a run: one JSON object per line and training step."""

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())  # a checkpoint must not survive a power cut that its log did not


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a kill may have cut the last one short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind(path: Path, step: int) -> None:
    """Forgets the steps after `step`, which the resumed run will take again."""
    kept = [record for record in read(path) if record["step"] <= step]
    rewritten = path.with_suffix(".partial")
    rewritten.unlink(missing_ok=True)
    append(rewritten, kept)
    os.replace(rewritten, path)
