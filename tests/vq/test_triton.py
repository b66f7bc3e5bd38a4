"""The Triton kernels without a GPU: by the interpreter against the definition, and compiled ahead of time for three chips."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import Interpreter, with_gradients

import mmgen_kernels as mk
from mmgen_kernels.battery.draws import rand, randn
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.vq import ops, reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may have
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
BENCHMARKED = (3, 8, 32, 64, 128, 256, 512, 1024)  # D
TRAINING = ("gather_rows", "sum_runs", "join_runs", "average_sizes", "average_codes")
PREPARATION = ("sum_codes", "mean_code", "centred_norms", "pack_codes", "pack_rows")


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


def assert_exact(interpreter, x, codebook, metric, mask=None, precision="exact"):
    found = interpreter.nearest_code(x, codebook, metric=metric, mask=mask, precision=precision)
    assert found.tolist() == reference.nearest_code(x, codebook, mask, metric, "exact").tolist()


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_the_definition(interpreter, data, metric):
    assert_exact(interpreter, *DATA_SETS[data](2, 37, 3, torch.float32, torch.float32), metric)


@pytest.mark.parametrize("data", ("fourfold", "near_ties", "grid", "mixed_codes"))
def test_ties_between_tiles(interpreter, data):
    assert_exact(interpreter, *DATA_SETS[data](2, 150, 3, torch.float32, torch.float32), "l2")


@pytest.mark.parametrize("x_dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=DTYPES.get)
def test_dtypes(interpreter, x_dtype, codebook_dtype):
    metric = "l2" if x_dtype == codebook_dtype else "cosine"
    assert_exact(interpreter, *DATA_SETS["near_ties"](2, 37, 3, x_dtype, codebook_dtype), metric)


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("dim", (1, 3, 8, 12, 65))
def test_odd_dims(interpreter, dim, metric):
    assert_exact(interpreter, *DATA_SETS["gaussian"](2, 131, dim, torch.float32, torch.float32), metric)


@pytest.mark.parametrize("dim", (200, 300))
def test_dims_that_fill_a_tile_or_take_several(interpreter, dim):
    assert_exact(interpreter, *DATA_SETS["clusters"](1, 20, dim, torch.float32, torch.float32), "l2")


def test_one_code_and_no_rows(interpreter):
    for metric in ops.METRICS:
        assert_exact(interpreter, randn(2, 3, seed=1), randn(1, 3, seed=2), metric)
    assert interpreter.nearest_code(torch.empty(2, 0, 3), torch.ones(4, 3)).shape == (2, 0)


def test_more_rows_than_a_tile_and_codes_in_several_splits(interpreter):
    x, codebook = DATA_SETS["gaussian"](130, 700, 2, torch.float32, torch.float32)
    mask = torch.zeros(130, dtype=torch.bool)
    mask[[0, 1, 127, 128, 129]] = True
    assert_exact(interpreter, x, codebook, "l2", mask)


def test_heads_mask_and_strides(interpreter):
    x = randn(2, 5, 3, 4, seed=1).float().permute(0, 2, 1, 3)[..., ::2]  # (H, 3, 5, 2)
    codebook = randn(2, 9, 2, seed=2).float().transpose(1, 2).contiguous().transpose(1, 2)  # (H, 9, 2)
    mask = rand(2, 3, 5, seed=3) < 0.7
    for metric in ops.METRICS:
        assert_exact(interpreter, x, codebook, metric, mask)


@pytest.mark.parametrize("gradient", ops.GRADIENTS)
def test_vector_quantize_takes_its_lookup(interpreter, gradient):
    """What surrounds the lookup is the reference's, to the bit."""
    x, codebook = DATA_SETS["clusters"](12, 40, 5, torch.float32, torch.float32)
    mask = rand(12, seed=3) < 0.7
    found = interpreter.vector_quantize(x, codebook, gradient=gradient, mask=mask)
    expected = with_gradients("reference", x.clone(), codebook.clone(), gradient=gradient, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_opcheck(interpreter):
    interpreter.opcheck(randn(2, 3, 4, seed=1).float(), randn(5, 4, seed=2).float(), None, "l2", "exact")


def test_fast_is_the_exact_index_too(interpreter):
    assert_exact(interpreter, *DATA_SETS["taming"](3, 70, 5, torch.float32, torch.float32), "l2", precision="fast")


@pytest.mark.parametrize("exponents", ((-500, -500), (500, 480), (-160, 160), (160, -160), (0, -330), (0, 0)), ids=str)
def test_magnitudes_that_only_fp64_has(interpreter, exponents):
    """Squares that overflow or vanish, ratios that fp32 cannot hold, and codes on both sides of what the proof covers."""
    x, codebook = randn(3, 4, seed=1) * 2.0 ** exponents[0], randn(40, 4, seed=2) * 2.0 ** exponents[1]
    if exponents == (0, 0):
        codebook[::3] *= 2.0**-520
        codebook[1::3] *= 2.0**520
    for metric in ops.METRICS:
        assert_exact(interpreter, x, codebook, metric)


@pytest.mark.long
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_the_definition_at_length(interpreter, data, metric):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.float64)):
        assert_exact(interpreter, *DATA_SETS[data](9, 300, 33, *dtypes), metric)


def test_the_device_rule():
    with mk.use_backend("triton"), pytest.raises(RuntimeError, match="runs on cuda tensors, not on cpu"):
        mk.nearest_code(torch.ones(2, 3), torch.ones(4, 3))


# -- ahead of time ----------------------------------------------------------------------------------------------------


def compiled(requests):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    root = str(Path(mk.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, script, json.dumps(requests)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return dict(zip(map(tuple, requests), map(json.loads, result.stdout.splitlines()), strict=True))


def assert_good_code(requests):
    for (kernel, capability, dim, metric), code in compiled(requests).items():
        where = f"{kernel} for sm_{capability}, D = {dim}, {metric}: {code}"
        assert code["stack"] == 0 and code["spills"] == 0, where
        assert code["shared"] <= SHARED[capability], where
        assert not code["block_pointers"], where
        if kernel == "sweep":
            assert MATRIX[capability] in code["instructions"], where
            assert ("UTMALDG" in code["instructions"]) == (capability >= 90), where  # codes come by tensor descriptor
        else:
            assert code["fused"] == 0, where
        if kernel == "settle" and metric != "cosine":  # whose division and root are made of them
            assert code["fused_in_code"] == 0, where


def test_compiles_without_spills():
    """The widest tiles of each chip, the smallest, those cut along D, and every other kernel once."""
    sweeps = [["sweep", 80, 256, ""], ["sweep", 90, 256, ""], ["sweep", 90, 8, ""], ["sweep", 100, 256, ""], ["sweep", 90, 512, ""]]
    assert_good_code([*sweeps, ["settle", 90, 256, "l2"], *([kernel, 90, 256, "cosine"] for kernel in (*PREPARATION, *TRAINING))])


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_compiles_without_spills(capability):
    sweeps = [["sweep", capability, dim, ""] for dim in BENCHMARKED]
    others = [[k, capability, d, m] for k in ("settle", *PREPARATION, *TRAINING) for d in (8, 256) for m in ops.METRICS]
    assert_good_code(sweeps + others)
