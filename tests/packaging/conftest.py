import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CONTRIBUTING.md", "Makefile", "csrc", "tools",
           "mmgen_kernels", "mmgen")  # fmt: skip
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")


def pytest_addoption(parser):
    parser.addoption("--wheel-folder", type=Path, default=None, help="the folder of a wheel that was built already")


class Tree:
    """A copy of the sources that a test may build in, and a folder it installs into."""

    def __init__(self, folder: Path):
        self.source, self.site = folder / "source", folder / "site"
        self.source.mkdir(parents=True)
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.source / name, ignore=BUILT)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, self.source / name)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        """In the source tree, with none of our variables set but the given ones."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MMGEN_KERNELS_") and k not in ("CXX", "PYTHONPATH")}
        return subprocess.run([sys.executable, *command], cwd=self.source, env=kept | variables, capture_output=True, text=True)

    def install(self, **variables: str) -> subprocess.CompletedProcess:
        flags = ["--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--verbose", "--upgrade"]
        return self.run("-m", "pip", "install", *flags, "--target", str(self.site), ".", **variables)

    def python(self, code: str, **variables: str) -> subprocess.CompletedProcess:
        """Runs code with the installed package, away from every checkout."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MMGEN_KERNELS_")}
        kept |= {"PYTHONPATH": str(self.site)} | variables
        return subprocess.run([sys.executable, "-c", code], cwd=self.site, env=kept, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture(scope="module")
def module_tree(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("tree"))
