"""Makes .venv and puts into it what a task needs; the Makefile calls it once per step.

    python tools/environment.py create            the environment: over a torch that this Python has, or with one of its own
    .venv/bin/python tools/environment.py package  mmgen-kernels, editable, C++ part included
    .venv/bin/python tools/environment.py extra NAME  the requirements of an extra

Every step may be interrupted and run again. None of them ever changes torch: a constraints file pins the one that is there.
Without a network a step works if what it needs is installed already.
"""

import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
CONSTRAINTS = ENVIRONMENT / "constraints.txt"
OLDEST_TORCH, NEWEST_TORCH, DEFAULT_TORCH = (2, 11), (2, 15), "2.13.0"


def usable_torch() -> str | None:
    """The version of the torch that this Python imports, if we support it."""
    spec = PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version: dict = {}
    exec((Path(spec.origin).parent / "version.py").read_text(), version)
    found = str(version["__version__"])
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if OLDEST_TORCH <= numbers <= NEWEST_TORCH:
        return found
    print(f"torch {found} is not one of 2.{OLDEST_TORCH[1]} to 2.{NEWEST_TORCH[1]}: {ENVIRONMENT.name} gets its own")
    return None


def create() -> None:
    """A virtual environment; over this Python's packages if torch is among them."""
    inherit = usable_torch() is not None
    flags = ["--system-site-packages"] if inherit else []
    command = [sys.executable, "-m", "venv", *flags, str(ENVIRONMENT)]
    if subprocess.run(command).returncode:  # Debian without python3-venv: no ensurepip, but often a pip to inherit
        print("no pip could be put into the environment; trying the pip of this Python")
        run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(ENVIRONMENT)])
    purelib = Path(capture([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]))
    if inherit and not missing(["setuptools>=77"]) and (purelib / "setuptools").exists():
        # the one that Python 3.11 puts into every new environment is too old, and would hide the inherited one
        pip("uninstall", "--yes", "setuptools")
    inherited = purelib / "_inherited.pth"
    inherited.unlink(missing_ok=True)
    if inherit and sys.prefix != sys.base_prefix:
        # this Python is itself a virtual environment, which --system-site-packages looks past
        folders = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        inherited.write_text("".join(f"{folder}\n" for folder in folders))
    run([PYTHON, __file__, "torch"])


def torch() -> None:
    """Torch itself, where nothing was inherited; and the constraint that keeps it."""
    CONSTRAINTS.unlink(missing_ok=True)
    if usable_torch() is None and not pip("install", f"torch=={DEFAULT_TORCH}"):
        sys.exit(f"torch could not be installed. With a network: pip install torch=={DEFAULT_TORCH}. Without one, use a Python"
                 f" that has torch 2.{OLDEST_TORCH[1]} to 2.{NEWEST_TORCH[1]}: make PYTHON=/path/to/python")  # fmt: skip
    version = capture([PYTHON, "-c", "import torch; print(torch.__version__)"])
    CONSTRAINTS.write_text(f"torch=={version}\n")
    print(f"torch {version}")


def package() -> None:
    """mmgen-kernels, editable."""
    if missing(["setuptools>=77", "wheel"]) and not pip("install", "-c", CONSTRAINTS, "setuptools>=77", "wheel"):
        sys.exit("setuptools >= 77 and wheel are needed to build, and could not be installed")
    editable = ["install", "--no-build-isolation", "-c", CONSTRAINTS, "-e", str(ROOT)]
    if pip(*editable):
        return
    print("trying again without dependencies")
    if not pip(*editable, "--no-deps"):
        sys.exit("mmgen-kernels could not be installed: see above")
    report_missing(read_project()["dependencies"], "some implementations are not available")


def extra(name: str) -> None:
    requirements = read_project()["optional-dependencies"][name]
    if pip("install", "-c", CONSTRAINTS, *requirements):
        return
    if report_missing(requirements, f"`{name}` needs them"):
        sys.exit(1)
    print(f"the versions that `{name}` asks for could not be had; going on with those that are installed")


def report_missing(requirements: list[str], consequence: str) -> bool:
    names = [re.match(r"[\w.-]+", r)[0] for r in requirements]
    if absent := missing(names):
        print(f"missing: {', '.join(absent)}: {consequence}", file=sys.stderr)
    return bool(absent)


def missing(requirements: list[str]) -> list[str]:
    """Those of them that are not installed (or, written name>=N, older than that)."""
    absent = []
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            absent.append(requirement)
            continue
        if least and int(re.match(r"\d+", version)[0]) < int(least):
            absent.append(requirement)
    return absent


def read_project() -> dict:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pip(*arguments: object) -> bool:
    """Whether pip succeeded. It is not asked whether there is a newer pip, which would need a network."""
    flags = ["--disable-pip-version-check", "--quiet", "--no-input", "--retries", "2"]
    return subprocess.run([PYTHON, "-m", "pip", *flags, *map(str, arguments)], cwd=ROOT).returncode == 0


def run(command: list) -> None:
    if code := subprocess.run([str(c) for c in command]).returncode:
        sys.exit(code)


def capture(command: list) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    step, *names = sys.argv[1:] or ["help"]
    steps = {"create": create, "torch": torch, "package": package, "extra": extra}
    if step not in steps:
        sys.exit(__doc__)
    steps[step](*names)
