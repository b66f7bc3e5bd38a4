"""The scripts in examples/ run as they stand, each a program of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ARGUMENTS = {  # and what the last line says
    "train_vq_vae": ("--steps 30", r"codes in use \d+%, perplexity \d+"),
    "train_dit": ("--steps 3 --sampling-steps 4 --out {folder}/stripes.png", r"striped as their class asks: \d of 8"),
    "sample_with_diffusers": ("--steps 5", r"\d ms a step"),
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent), prepend=":")
    arguments, wanted = ARGUMENTS[name]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--device", "cpu", *arguments.format(folder=tmp_path).split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(wanted, done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.long
def test_the_transformer_of_stripes_learns_its_classes(tmp_path):
    command = [sys.executable, str(EXAMPLES / "train_dit.py"), "--device", "cpu", "--sampling-steps", "ddim50"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "samples striped as their class asks: 8 of 8"
