"""`make sanitize`: no case of the battery reads or writes what is not its own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are preloaded as Linux has it")
def test_the_battery_under_sanitizers():
    done = subprocess.run([sys.executable, "tools/sanitize.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
