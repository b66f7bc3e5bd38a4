"""Checkpoints that a kill at any moment cannot spoil.

    folder/step-00000100/model.safetensors     weights
                         config.json           what is needed to build the model and to go on as before
                         training_state.pt     step, optimizer, random number generators

A checkpoint is written under another name, forced to the disk, and then renamed: a folder called `step-*` is whole.
"""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTIAL = ".partial-"
# What the libraries raise for files that are cut short, missing or no files, and for disks that are full
OF_FILES = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError)


def save(
    folder: Path, step: int, weights: dict[str, Tensor], config: dict, state: dict[str, Any], *, keep: int
) -> Path:
    """Writes the checkpoint of `step` and then drops all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    _drop_partial(folder)
    target = folder / f"step-{step:08d}"
    if not target.exists():
        partial = folder / f"{PARTIAL}{target.name}"
        on_host = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
        try:
            partial.mkdir()
            save_file(on_host, partial / "model.safetensors")
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            torch.save(state, partial / "training_state.pt")
            for file in (*partial.iterdir(), partial):
                _to_disk(file)
        except OF_FILES as error:
            raise OSError(f"{partial} cannot be written: {_why(error)}; the checkpoints before it are whole") from error
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
    with _reading(checkpoint / "model.safetensors") as path:
        return load_file(path)


def read_config(checkpoint: Path) -> dict:
    with _reading(checkpoint / "config.json") as path:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds {type(config).__name__}, not settings by name")
        return config


def read_state(checkpoint: Path) -> dict[str, Any]:
    with _reading(checkpoint / "training_state.pt") as path:
        return torch.load(path, map_location="cpu", weights_only=True)


def _whole(folder: Path) -> list[Path]:
    """Oldest first; the steps are padded, so that names sort as numbers."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit())


def _why(error: Exception) -> str:
    """In one line: libraries go on with guesses, and with their stack."""
    return " ".join(str(error).split(". ")[0].split()) or type(error).__name__


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """What goes wrong names the file, and what to do where others are whole."""
    try:
        yield path
    except OF_FILES as error:
        remedy = f"without {path.parent.name} the checkpoint before it is taken"
        raise ValueError(f"{path} cannot be read: {_why(error)}; {remedy}") from error


def _drop_partial(folder: Path) -> None:
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
