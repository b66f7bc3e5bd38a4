"""The package installs and works where something is missing, and says what."""

import json
import os
import shutil

import pytest

LOOKUP = """
import torch, mmgen_kernels as mk
x, codebook = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.5]])
assert mk.nearest_code(x, codebook).tolist() == [1]
"""
INFO = "import mmgen_kernels.cli as c; c.main(['info'])"
NO_COMPILER = "/nonexistent/c++"


@pytest.fixture
def small(tree):
    """A C++ part that compiles in a second: these tests are about the build, not about what is built."""
    shutil.rmtree(tree.source / "csrc")
    (tree.source / "csrc").mkdir()
    (tree.source / "csrc" / "header.h").write_text("#pragma once\n")
    (tree.source / "csrc" / "registration.cpp").write_text('#include "header.h"\nint mmgen_kernels_nothing() { return 1; }\n')
    return tree


def installed(tree) -> list[str]:
    return sorted(p.name for p in (tree.site / "mmgen_kernels").iterdir() if p.suffix in (".so", ".json"))


def test_without_a_compiler_it_installs_works_and_says_why(tree):
    done = tree.install(CXX=NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "building WITHOUT mmgen_kernels._C: no C++ compiler" in done.stdout + done.stderr
    assert installed(tree) == ["_build.json"]
    used = tree.python(LOOKUP + INFO + "\nwith mk.use_backend('cpp'):\n    mk.nearest_code(x, codebook)")
    assert "nearest_code runs as plain PyTorch on cpu" in used.stderr
    assert f"not built: no C++ compiler: '{NO_COMPILER}' was not found" in used.stdout
    assert used.returncode != 0
    assert "RuntimeError: use_backend('cpp') cannot serve nearest_code" in used.stderr
    assert "no C++ compiler" in used.stderr.rpartition("RuntimeError: ")[2]


def test_a_compiler_is_demanded_when_the_cpp_part_is(small):
    done = small.install(CXX=NO_COMPILER, MMGEN_KERNELS_BUILD="1")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stdout + done.stderr


def test_errors_of_the_compiler_are_shown_and_kept(small):
    (small.source / "csrc" / "registration.cpp").write_text("not C++\n")
    done = small.install()
    assert done.returncode == 0, done.stderr
    assert "building WITHOUT mmgen_kernels._C" in done.stdout + done.stderr
    facts = json.loads((small.site / "mmgen_kernels" / "_build.json").read_text())
    assert not facts["built"]
    assert "registration.cpp" in facts["cause"]


def test_the_cpp_part_can_be_left_out(small):
    assert small.install(MMGEN_KERNELS_BUILD="0").returncode == 0
    assert installed(small) == ["_build.json"]
    used = small.python(LOOKUP + INFO)
    assert used.returncode == 0, used.stderr
    assert "not built: MMGEN_KERNELS_BUILD=0 at build time" in used.stdout


def test_an_unknown_wish_is_refused(small):
    done = small.run("setup.py", "--version", MMGEN_KERNELS_BUILD="yes")
    assert done.returncode != 0
    assert "must be auto, 0 or 1, got 'yes'" in done.stderr


WITHOUT_TORCH = """
import runpy, sys
import importlib.machinery as m
real = m.PathFinder.find_spec
hide = lambda cls, name, path=None, target=None: None if name == "torch" else real(name, path, target)
m.PathFinder.find_spec = classmethod(hide)
sys.argv = ["setup.py", "-q", "build", "--build-base", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("build", ["auto", "1"])
def test_torch_not_found_gives_a_message(small, build, tmp_path):
    done = small.run("-c", WITHOUT_TORCH, str(tmp_path / "build"), MMGEN_KERNELS_BUILD=build)
    assert "torch was not found at build time; install torch first, then: pip install --no-build-isolation ." in done.stderr
    assert (done.returncode == 0) == (build == "auto")
    if build == "auto":
        (facts,) = (tmp_path / "build").glob("lib*/mmgen_kernels/_build.json")
        assert "torch was not found" in json.loads(facts.read_text())["cause"]


def test_an_extension_that_does_not_load_is_shown_not_hidden(small):
    assert small.install(MMGEN_KERNELS_BUILD="0").returncode == 0
    package = small.site / "mmgen_kernels"
    (package / "_C.abi3.so").write_bytes(b"no ELF")
    (package / "_build.json").write_text(json.dumps({"built": True, "torch": "9.9.9"}))
    used = small.python(LOOKUP + INFO)
    assert used.returncode == 0, used.stderr
    assert "the C++ part does not load, the reference serves the CPU: built for torch 9.9.9, you have" in used.stderr
    assert "built for torch 9.9.9" in used.stdout


def in_place(tree, **variables):
    done = tree.run("setup.py", "build_ext", "--inplace", **variables)
    assert done.returncode == 0, done.stderr
    return {p.name: p.stat().st_mtime_ns for p in (tree.source / "build" / "objects").glob("*.o")}


def test_only_changed_files_are_compiled(small):
    (small.source / "csrc" / "other.cpp").write_text("int mmgen_kernels_other() { return 2; }\n")
    first = in_place(small)
    assert len(first) == 2
    assert in_place(small) == first

    source = small.source / "csrc" / "other.cpp"
    os.utime(source, ns=(first["csrc_other.cpp.o"] + 1,) * 2)  # not in the future of a quick build
    second = in_place(small)
    assert second["csrc_registration.cpp.o"] == first["csrc_registration.cpp.o"]
    assert second["csrc_other.cpp.o"] > first["csrc_other.cpp.o"]

    os.utime(small.source / "csrc" / "header.h", ns=(max(second.values()) + 1,) * 2)
    third = in_place(small)
    assert third["csrc_registration.cpp.o"] > second["csrc_registration.cpp.o"]
    assert third["csrc_other.cpp.o"] == second["csrc_other.cpp.o"]  # which does not include it


def test_what_no_longer_builds_leaves_no_old_extension(small):
    in_place(small)
    extension = small.source / "mmgen_kernels" / "_C.abi3.so"
    assert extension.exists()
    (small.source / "csrc" / "registration.cpp").write_text("not C++\n")
    in_place(small)
    assert not extension.exists()
    assert not json.loads((small.source / "mmgen_kernels" / "_build.json").read_text())["built"]
