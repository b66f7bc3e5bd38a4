"""What the documentation says of environment variables, tasks, links and overheads is so."""

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmgen_kernels import backends, library


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


def test_every_environment_variable_is_in_the_table(root):
    sources = [*root.glob("mmgen_kernels/**/*.py"), *root.glob("mmgen/**/*.py"), *root.glob("csrc/**/*.cpp"), root / "setup.py"]
    name = r"MMGEN_[A-Z_]*[A-Z]\b(?!\()"  # what has arguments is a macro
    used = set().union(*(re.findall(name, path.read_text()) for path in sources))
    table = set(re.findall(r"^\| `(MMGEN_[A-Z_]+)` \|", (root / "docs" / "design.md").read_text(), re.MULTILINE))
    assert table == used


def test_links_lead_somewhere(root):
    for page in [*root.glob("*.md"), *root.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            generated = target.endswith((".png", "performance.md"))  # from results; benchmarks.report --check looks after them
            assert generated or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_task_is_explained(root):
    makefile = (root / "Makefile").read_text()
    declared = set(re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()) - {"python"}
    assert declared == set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))


@pytest.mark.parametrize("table", ("overhead", "codes", "tokenizers", "step_profile"))
def test_a_table_is_that_of_the_results(table, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [table, "--check"])
    assert importlib.import_module(f"benchmarks.{table}").main() == 0, capsys.readouterr().err


def test_the_operator_that_the_guide_adds_works(root):
    registered = set(library.OPERATORS)
    plain, public, schema = re.findall(r"```python\n(.*?)```", (root / "docs" / "add-an-op.md").read_text(), re.DOTALL)
    reference = {"Tensor": torch.Tensor}
    exec(plain, reference)
    toy = {"Tensor": torch.Tensor, "backends": backends, "library": library, "check": lambda x, y: None}
    toy["reference"] = SimpleNamespace(**reference)
    exec(public + schema, toy)
    for name in set(library.OPERATORS) - registered:  # it works on, and the walks over all operators do not see it
        del library.OPERATORS[name]
    x, y = (torch.tensor(values, requires_grad=True) for values in ([1.0, 2.0], [3.0, 5.0]))
    torch.library.opcheck(torch.ops.mmgen_kernels.scaled_add.default, (x, y, 2.0))
    torch.library.opcheck(torch.ops.mmgen_kernels.scaled_add_backward.default, (x.detach(), 2.0, True, True))
    with backends.use_backend("reference"):
        toy["scaled_add"](x, y, factor=2.0).sum().backward()
    assert x.grad.tolist() == [1, 1] and y.grad.tolist() == [2, 2]


def test_an_old_python_is_told_so(root, tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo "Python 3.8.1";; *) exit 1;; esac\n')
    old.chmod(0o755)
    # a copy of the Makefile alone: no environment that exists already
    (tmp_path / "Makefile").write_text((root / "Makefile").read_text())
    for python, message in ((old, "Python 3.11 or newer is needed"), (tmp_path / "absent", "was not found")):
        done = subprocess.run(["make", f"PYTHON={python}", "python"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        assert message in done.stdout
