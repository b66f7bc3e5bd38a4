"""Checkpoints that a kill at any moment cannot spoil.

    folder/step-00000100/model.safetensors     weights
                         config.json           what is needed to build the model and to go on as before
                         training_state.pt     step, optimizer, random number generators

A checkpoint is written under another name, forced to the disk, and then renamed: a folder called `step-*` is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTIAL = ".partial-"


def save(
    folder: Path, step: int, weights: dict[str, Tensor], config: dict, state: dict[str, Any], *, keep: int
) -> Path:
    """Writes the checkpoint of `step` and then drops all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    _drop_partial(folder)
    target = folder / f"step-{step:08d}"
    if not target.exists():
        partial = folder / f"{PARTIAL}{target.name}"
        partial.mkdir()
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial / "model.safetensors")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        torch.save(state, partial / "training_state.pt")
        for file in (*partial.iterdir(), partial):
            _to_disk(file)
        partial.rename(target)
        _to_disk(folder)
    for old in _whole(folder)[:-keep]:
        # Renamed first: a kill amid the removal must not leave a half-empty folder under a whole one's name.
        shutil.rmtree(old.rename(folder / f"{PARTIAL}{old.name}"))
    return target


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`, if there is one."""
    whole = _whole(folder)
    return whole[-1] if whole else None


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def read_config(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def read_state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)


def _whole(folder: Path) -> list[Path]:
    """Oldest first; the steps are padded, so that names sort as numbers."""
    return sorted(folder.glob("step-*"))


def _drop_partial(folder: Path) -> None:
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
