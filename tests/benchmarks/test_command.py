"""The command line: unknown names end with what there is, and every family declares what the harness needs."""

import importlib

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqs"], r"unknown family 'vqs'; did you mean vq\?\nknown: .*vq"),
        (["vq", "--shapes", "8192x1024x65"], r"unknown shape '8192x1024x65'; did you mean .*8192x1024x64"),
        (["vq", "--contestants", "ours,fais"], r"unknown contestant 'fais'; did you mean faiss"),
        (["vq", "--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_unknown_names(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments, "--threads", "1"])


def test_chosen_takes_a_shape_in_every_group_and_keeps_the_order():
    known = ["lookup/8x8x8", "lookup/9x9x9", "training/8x8x8"]
    assert command.chosen("8x8x8", known, "shape") == ["lookup/8x8x8", "training/8x8x8"]
    assert command.chosen("training/8x8x8, 9x9x9", known, "shape") == ["lookup/9x9x9", "training/8x8x8"]
    assert command.chosen(None, known, "shape") == known


@pytest.mark.parametrize("family", command.families())
def test_families_declare_cases_a_quick_choice_and_bars(family):
    module = importlib.import_module(f"benchmarks.{family}")
    cases = module.cases(CPU)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) and set(module.QUICK) <= set(names)
    on_cuda = [case.name for case in module.cases(torch.device("cuda"))]
    assert set(getattr(module, "QUICK_CUDA", module.QUICK)) <= set(on_cuda)
    for case in cases:
        contestants = [contestant.name for contestant in case.contestants]
        assert len(set(contestants)) == len(contestants) and case.name.startswith(f"{case.group}/")
    assert not any(bar.passed for bar in module.bars({}))


def test_list(capsys):
    assert command.main(["vq", "--list", "--threads", "1"]) == 0
    assert "lookup/8192x1024x64" in capsys.readouterr().out


def test_slug_is_the_device_and_nothing_of_the_host(monkeypatch):
    monkeypatch.setattr(machine, "device_name", lambda device: "Intel(R) Xeon(R) Gold 6430 CPU @ 2.10GHz")
    assert machine.slug(CPU, 2) == "intel-xeon-gold-6430-2-threads"
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H200")
    assert machine.slug(torch.device("cuda"), 2) == "nvidia-h200"
