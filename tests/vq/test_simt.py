"""The CUDA kernels without a GPU: run whole by g++ on fibers against the definition, and compiled by nvcc for two chips.

The fibers' matrix unit cuts off what falls below the largest addend, as NVIDIA's do at worst: the bound must hold for that.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmgen_kernels.battery.draws import rand, randn
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.vq import cuda, ops, reference

_probe = pytest.importorskip("mmgen_kernels._probe", reason="built without MMGEN_KERNELS_PROBE=1")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def as_numpy(tensor):
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).contiguous().numpy()


def nearest_code(x, codebook, metric, mask=None, blocks=1, backwards=False):
    """x (H, N, D) and codebook (H, K, D), or both without H; `blocks` fill the chip, so that more split the codebook."""
    if codebook.dim() == 2:
        x, codebook, mask = x[None], codebook[None], None if mask is None else mask[None]
    valid = None if mask is None else mask.numpy()
    found = _probe.nearest_code_by_fibers(
        as_numpy(x), DTYPES[x.dtype], as_numpy(codebook), DTYPES[codebook.dtype], valid, metric, blocks, backwards
    )
    return torch.from_numpy(found)


def assert_exact(x, codebook, metric, mask=None, **options):
    found = nearest_code(x, codebook, metric, mask, **options)
    expected = reference.nearest_code(x, codebook, mask, metric, "exact")
    assert found.flatten().tolist() == expected.flatten().tolist()


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_the_definition(data, metric):
    assert_exact(*DATA_SETS[data](5, 150, 3, torch.float32, torch.float32), metric, blocks=2)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=DTYPES.get)
def test_dtypes(x_dtype, codebook_dtype):
    for data, metric in (("near_ties", "l2"), ("gaussian", "cosine")):
        assert_exact(*DATA_SETS[data](3, 70, 8, x_dtype, codebook_dtype), metric)


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("dim", (1, 2, 8, 12, 16, 17, 32, 33, 48, 63, 64))
def test_dims(dim, metric):
    """Every number of steps, full and not."""
    assert_exact(*DATA_SETS["gaussian"](3, 131, dim, torch.float32, torch.float32), metric, blocks=3)


@pytest.mark.parametrize("rows", (1, 31, 127, 128, 129, 300))
@pytest.mark.parametrize("codes", (1, 63, 64, 65, 200))
def test_sizes(rows, codes):
    assert_exact(*DATA_SETS["clusters"](rows, codes, 4, torch.float32, torch.float32), "l2", blocks=7)


def test_chunks_and_parts_grow_with_the_codebook():
    """Above 65536 codes a chunk holds more than 64, above 16384 a part of the sums more than 128."""
    x, codebook = randn(2, 3, seed=1).float(), randn(66_000, 3, seed=2).float()
    assert_exact(x, codebook, "l2")


def test_heads_and_mask():
    x, codebook = randn(3, 130, 5, seed=1).float(), randn(3, 90, 5, seed=2).float()
    mask = rand(3, 130, seed=3) < 0.7
    for metric in ops.METRICS:
        assert_exact(x, codebook, metric, mask, blocks=12)


@pytest.mark.parametrize("exponents", ((-500, -500), (500, 480), (-160, 160), (160, -160), (0, -330), (0, 0)), ids=str)
def test_magnitudes_that_only_fp64_has(exponents):
    x, codebook = randn(3, 4, seed=1) * 2.0 ** exponents[0], randn(40, 4, seed=2) * 2.0 ** exponents[1]
    if exponents == (0, 0):
        codebook[::3] *= 2.0**-520
        codebook[1::3] *= 2.0**520
    for metric in ops.METRICS:
        assert_exact(x, codebook, metric)


def test_order_of_threads():
    """A missing barrier would show: the threads of a block run in the opposite order."""
    x, codebook = DATA_SETS["near_ties"](140, 200, 20, torch.float32, torch.float32)
    assert nearest_code(x, codebook, "l2").tolist() == nearest_code(x, codebook, "l2", backwards=True).tolist()


def test_fibers_see_missing_and_divergent_barriers():
    neighbours = [t ^ 1 for t in range(64)]
    assert all(_probe.neighbours_by_fibers(1, backwards).tolist() == neighbours for backwards in (False, True))
    for backwards in (False, True):
        assert _probe.neighbours_by_fibers(0, backwards).tolist() != neighbours
    with pytest.raises(RuntimeError, match="a barrier that not all threads reach"):
        _probe.neighbours_by_fibers(2, False)


@pytest.mark.long
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_the_definition_at_length(data, metric):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.float64)):
        assert_exact(*DATA_SETS[data](40, 1500, 19, *dtypes), metric, blocks=5)


def test_wide_vectors_go_to_triton(monkeypatch):
    pytest.importorskip("triton")
    from mmgen_kernels.vq import triton_kernels

    monkeypatch.setattr(triton_kernels, "nearest_code", lambda *arguments: arguments)
    arguments = torch.ones(2, cuda.MAX_DIM + 1), torch.ones(3, cuda.MAX_DIM + 1), None, "l2", "exact"
    assert all(got is given for got, given in zip(cuda.nearest_code(*arguments), arguments, strict=True))


# -- ahead of time ----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cross_build_without_spills(tmp_path):
    """The CUDA part as setup.py builds it, for sm_80 and sm_90a: no spills, no stack, matrix instructions in the sweeps."""
    environment = os.environ | {"MMGEN_KERNELS_CUDA": "1", "MMGEN_KERNELS_BUILD": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.S,
    )
    lookups = ["sum_codes", "pack_codes", "settle", *["sweep"] * 4]  # sweeps of 1 to 4 steps
    streams = ["Integers", *["Uniform"] * 4, *["Normal"] * 4, "fold_keys"]
    steps = ["take_step"] * 6  # fp64, fp32 and all of 16 bits, with a tensor's noise and a key's
    for chip in ("sm_80", "sm_90a"):
        names = [name for name, target, *_ in found if target == chip]
        expected = lookups + streams + steps
        assert len(names) == len(expected), names
        assert all(sum(kernel in name for name in names) == expected.count(kernel) for kernel in expected)
    for name, target, stack, stores, loads, registers in found:
        assert (stack, stores, loads) == ("0", "0", "0"), (name, target)
        assert int(registers) <= 128, (name, target)  # four blocks of a sweep share a multiprocessor

    library = next((tmp_path / "mmgen_kernels").glob("_C_cuda*.so"))
    triton = importlib.util.find_spec("triton")  # which brings the tool; the toolkit may lack it
    cuobjdump = shutil.which("cuobjdump") or Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([cuobjdump, "-sass", library], capture_output=True, text=True, check=True).stdout
    sweeps = [part for part in code.split("Function : ")[1:] if "sweep" in part.splitlines()[0]]
    assert len(sweeps) == 8 and all("HMMA.16816.F32" in sweep for sweep in sweeps)
