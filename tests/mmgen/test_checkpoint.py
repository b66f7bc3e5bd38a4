import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from mmgen.training import checkpoint


def save(folder: Path, step: int, keep: int = 2) -> Path:
    """A checkpoint in which every part knows its step."""
    weights = {"a": torch.full((300, 300), float(step)), "b.c": torch.tensor(step)}
    state = {"step": step, "m": torch.full((9,), step)}
    return checkpoint.save(folder, step, weights, {"step": step}, state, keep=keep)


def require_whole(path: Path) -> int:
    """The step of a checkpoint after reading all of it."""
    step = int(path.name.removeprefix("step-"))
    weights, state = checkpoint.read_weights(path), checkpoint.read_state(path)
    assert weights["a"].shape == (300, 300) and (weights["a"] == step).all() and weights["b.c"] == step
    assert state["step"] == step and (state["m"] == step).all()
    assert checkpoint.read_config(path) == {"step": step}
    return step


def test_round_trip_keeps_bits_dtypes_and_names(tmp_path):
    weights = {
        "conv.weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3),
    }
    path = checkpoint.save(tmp_path, 7, weights, {"x": [1, "y"]}, {"rng": torch.get_rng_state()}, keep=1)
    back = checkpoint.read_weights(path)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) and back[k].dtype == weights[k].dtype for k in weights)
    assert checkpoint.read_config(path) == {"x": [1, "y"]}
    assert torch.equal(checkpoint.read_state(path)["rng"], torch.get_rng_state())
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors", "training_state.pt"]


def test_only_the_last_ones_are_kept(tmp_path):
    for step in (5, 50, 500, 5000):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000500", "step-00005000"]
    assert require_whole(checkpoint.latest(tmp_path)) == 5000


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


@pytest.mark.parametrize("share", (0.0, 0.5, None), ids=("empty", "cut short", "missing"))
@pytest.mark.parametrize("name", ("model.safetensors", "config.json", "training_state.pt"))
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, share):
    path = save(tmp_path, 5)
    file, read = path / name, {"model": checkpoint.read_weights, "config": checkpoint.read_config}.get(name.split(".")[0])
    content = file.read_bytes()
    file.unlink() if share is None else file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name} cannot be read: .+; without step-00000005 the checkpoint before it is taken"):
        (read or checkpoint.read_state)(path)


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    path = save(tmp_path, 5)
    (tmp_path / "step-notes").write_text("mine")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-old").mkdir()
    assert checkpoint.latest(tmp_path) == path
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json cannot be read: it holds list, not settings by name"):
        checkpoint.read_config(path)


def write_on_a_full_disk(folder: Path, name: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # of a file: what a full disk is to a writer
    tensors = {of: torch.zeros(300 if of == name else 1, 300) for of in ("weights", "state")}
    with pytest.raises(OSError, match=r"step-00000009 cannot be written: .+; the checkpoints before it are whole"):
        checkpoint.save(folder, 9, {"a": tensors["weights"]}, {"step": 9}, {"m": tensors["state"]}, keep=2)


@pytest.mark.parametrize("name", ("weights", "state"))
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, name):
    save(tmp_path, 5)
    process = multiprocessing.get_context("spawn").Process(target=write_on_a_full_disk, args=(tmp_path, name))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert require_whole(checkpoint.latest(tmp_path)) == 5
    assert require_whole(save(tmp_path, 9)) == 9


class Cut(Exception):
    pass


def test_a_cut_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every call that touches the disk is cut in turn, before it acts, until one save gets through uncut."""
    calls_left = 0

    def cuttable(function):
        def call(*args, **kwargs):
            nonlocal calls_left
            calls_left -= 1
            if calls_left < 0:
                raise Cut
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (checkpoint, "save_file"), (torch, "save"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename"),
        (os, "fsync"), (shutil, "rmtree"), (os, "rmdir"), (os, "unlink"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, cuttable(getattr(owner, name)))

    uncut = False
    cuts = 0
    while not uncut:
        folder = tmp_path / f"cut-at-{cuts}"
        calls_left = 10**6
        for step in (1, 2):
            save(folder, step)
        calls_left = cuts
        try:
            save(folder, 3)
            uncut = True
        except Cut:
            cuts += 1
        calls_left = 10**6
        assert require_whole(checkpoint.latest(folder)) in (2, 3)
        save(folder, 4)
        assert require_whole(checkpoint.latest(folder)) == 4
        assert len(list(folder.iterdir())) == 2
    assert cuts > 10


def save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    for step in range(1, 10**6):
        save(folder, step)


@pytest.mark.parametrize("attempt", range(5))
def test_sigkill_amid_saving_leaves_a_whole_checkpoint(tmp_path, attempt):
    process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while checkpoint.latest(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.Random(attempt).uniform(0.05, 0.3))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    reached = require_whole(checkpoint.latest(tmp_path))
    save(tmp_path, reached + 1)
    assert require_whole(checkpoint.latest(tmp_path)) == reached + 1
    assert len(list(tmp_path.iterdir())) == 2
