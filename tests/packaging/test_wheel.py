"""One wheel on the oldest torch we support and on the one we develop with, each in an environment of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TORCHES = ("2.11.0", "2.13.0")
FREE_BYTES = 20 << 30  # a CUDA build of torch with its libraries, and pip's copies of them while it installs

CHECK = """
import sys, torch, mmgen_kernels as mk
from mmgen_kernels import backends
assert torch.__version__.startswith(sys.argv[1]), torch.__version__
assert not mk.__file__.startswith(sys.argv[2]), "the checkout was imported, not the wheel"
assert backends.library_error() is None, backends.library_error()
torch.manual_seed(0)
x, codebook = torch.randn(100, 12), torch.randn(50, 12)
for metric in ("l2", "cosine", "dot"):
    with mk.use_backend("cpp"):
        ours = mk.nearest_code(x, codebook, metric=metric)
    with mk.use_backend("reference"):
        assert torch.equal(ours, mk.nearest_code(x, codebook, metric=metric)), metric
op = torch.ops.mmgen_kernels.vector_quantize.default
x.requires_grad_(), codebook.requires_grad_()
torch.library.opcheck(op, (x, codebook, None, 0.25, False, "straight_through", "l2", "exact"))

def loss(x, codebook):
    out = mk.vector_quantize(x, codebook)
    return out.loss + out.quantized.square().sum()

eager = torch.autograd.grad(loss(x, codebook), (x, codebook))
compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, codebook), (x, codebook))
for a, b in zip(eager, compiled, strict=True):
    torch.testing.assert_close(a, b)
print("all right")
"""


@pytest.fixture(scope="module")
def wheel(request, module_tree, tmp_path_factory):
    folder = request.config.getoption("--wheel-folder", default=None)
    if folder is None:
        folder = tmp_path_factory.mktemp("dist")
        done = module_tree.run("tools/build_wheel.py", str(folder))
        assert done.returncode == 0, done.stderr
    return max(folder.absolute().glob("*.whl"), key=lambda path: path.stat().st_mtime)


@pytest.mark.long
@pytest.mark.parametrize("version", TORCHES)
def test_one_wheel_on_each_torch(wheel, version, tmp_path, request):
    if (free := shutil.disk_usage(tmp_path).free) < FREE_BYTES:
        pytest.fail(f"an environment with torch {version} takes {FREE_BYTES >> 30} GiB at {tmp_path}, {free >> 30} are free")
    python = str(tmp_path / "environment" / "bin" / "python")
    try:
        run([sys.executable, "-m", "venv", tmp_path / "environment"], tmp_path)
        run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", f"torch=={version}", str(wheel)], tmp_path)
        script = tmp_path / "check.py"
        script.write_text(CHECK)
        assert "all right" in run([python, script, version, str(request.config.rootpath)], tmp_path)
        info = run([Path(python).with_name("mmgen-kernels"), "info"], tmp_path)
        assert "loaded         yes" in info
        assert "cpp        available" in info
    finally:
        shutil.rmtree(tmp_path / "environment", ignore_errors=True)


def run(command, folder) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MMGEN_KERNELS_") and k != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
