"""What the sdist and the wheel hold."""

import json
import tarfile
import tomllib
import zipfile

import pytest


@pytest.fixture(scope="module")
def built(module_tree):
    """(sdist, wheel) of a tree in which everything, tests' extension included, had been built before."""
    tree = module_tree
    for name in ("_probe.cpython-311-x86_64-linux-gnu.so", "_stale.so", "_build.json"):
        (tree.source / "mmgen_kernels" / name).write_text("{}")
    stale = tree.source / "build" / "lib.linux-x86_64-cpython-311" / "mmgen_kernels"
    stale.mkdir(parents=True)
    (stale / "gone.py").write_text("")
    out = tree.source.parent / "dist"
    small = tree.source / "csrc" / "registration.cpp"
    for path in (tree.source / "csrc").rglob("*.cpp"):
        path.write_text("")  # compiles at once: the contents do not depend on it
    small.write_text("int mmgen_kernels_nothing() { return 1; }\n")
    done = tree.run("tools/build_wheel.py", str(out))
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_serves_every_python_from_3_11(built):
    assert "-cp311-abi3-" in built[1].name


def test_the_wheel_holds_both_packages_and_the_extension(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        facts = json.loads(wheel.read("mmgen_kernels/_build.json"))
    wanted = {"_C.abi3.so", "_build.json", "py.typed", "library.py", "vq/ops/lookup.py"}
    assert {f"mmgen_kernels/{name}" for name in wanted} <= names
    assert "mmgen/__init__.py" in names
    assert facts["built"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_nothing_else(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert not [n for n in names if "_probe" in n or "stale" in n or "gone" in n]
    roots = {n.split("/")[0] for n in names}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"mmgen_kernels", "mmgen"}
    assert not [n for n in names if n.endswith((".cpp", ".h", ".cu"))]


def test_the_sdist_holds_the_sources_and_no_build(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "csrc/registration.cpp", "csrc/vq/nearest_code.h"} <= names
    assert not [n for n in names if n.endswith(".so") or n.startswith(("tests/", "build/"))]


def test_requirements_name_no_other_torch(request):
    """torch is not required to build: asking for it would fetch another one than the user's."""
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())
    assert not [r for r in project["build-system"]["requires"] if r.startswith("torch")]
    extras = project["project"]["optional-dependencies"]
    assert not [r for requirements in extras.values() for r in requirements if r.split(">")[0].split("=")[0] == "torch"]
