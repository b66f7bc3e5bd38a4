"""Builds the wheel from the sdist, so that what the sdist forgets is noticed: `python tools/build_wheel.py FOLDER`."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, source: Path = ROOT) -> tuple[Path, Path]:
    """(sdist, wheel), both in `folder`. The C++ part must build, and the extension for tests stays out."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MMGEN_KERNELS_BUILD": "1", "MMGEN_KERNELS_PROBE": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        egg = [f"--egg-base={scratch}"]  # no .egg-info left in the checkout
        run([sys.executable, "setup.py", "-q", "egg_info", *egg, "sdist", "--dist-dir", scratch], source, environment)
        (sdist,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        tree = Path(scratch) / sdist.name.removesuffix(".tar.gz")
        flags = ["--quiet", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
        run([sys.executable, "-m", "pip", "wheel", *flags, "-w", f"{scratch}/wheel", str(tree)], tree, environment)
        (wheel,) = Path(scratch, "wheel").glob("*.whl")
        results = folder / sdist.name, folder / wheel.name
        for made, kept in zip((sdist, wheel), results, strict=True):
            kept.write_bytes(made.read_bytes())
    return results


def run(command: list[str], folder: Path, environment: dict) -> None:
    if code := subprocess.run(command, cwd=folder, env=environment).returncode:
        raise SystemExit(code)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for path in build(Path(sys.argv[1])):
        print(path)
