"""code_entropy in Triton without a GPU: by the interpreter against fp64, and compiled ahead of time for three chips."""

import importlib.util

import pytest
import torch
from test_triton import SHARED, compiled
from triton_interpreter import Interpreter

from mmgen_kernels.battery import tolerance
from mmgen_kernels.battery.draws import rand, randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.vq.code_entropy import NAMES, dense, run
from mmgen_kernels.vq import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


def assert_near(interpreter, x, codebook, mask=None, uses=NAMES, temperature=1.0, metric="l2", eps=0.0):
    options = {"temperature": temperature, "metric": metric, "eps": eps}
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    upstream = randn(*x.shape[:-1], seed=8).to(wide), (rand(*codebook.shape[:-2], seed=9) - 2).to(wide)
    truth = run(lambda a, b: dense(a, b, mask, **options, differences=True), x.double(), codebook.double(), upstream, uses)
    plain = run(lambda a, b: dense(a, b, mask, **options), x.to(wide), codebook.to(wide), upstream, uses)
    found = interpreter.code_entropy(x, codebook, upstream, mask=mask, uses=uses, **options)
    for name, value in found.items():
        of = {"grad_x": x, "grad_codebook": codebook}.get(name, plain[name]).dtype
        bar = plain[name]
        if of.itemsize == 2:  # what is rounded to 16 bits has the error of 16 bits for a bar
            bar = run(lambda a, b: dense(a, b, mask, **options), x.to(of), codebook.to(of), upstream, uses)[name]
        _, failure = tolerance.failure(name, value, bar.to(of), truth[name])
        assert failure is None, failure
    return found


def inputs(n, k, d, dtype=torch.float32):
    return randn(n, d, seed=1).to(dtype), randn(k, d, seed=2).to(dtype)


@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("sizes", ((5, 70, 3), (70, 5, 17), (66, 130, 70)), ids=str)
def test_values_and_gradients(interpreter, metric, sizes):
    """Rows and codes beyond a tile, D beyond a piece, gradients wider than a program's columns; several ranges of either."""
    assert_near(interpreter, *inputs(*sizes), metric=metric, temperature=float(sizes[2]), eps=1e-5)


@pytest.mark.parametrize("uses", (NAMES[:1], NAMES[1:]), ids=("sample", "mean"))
def test_either_entropy_alone(interpreter, uses):
    assert_near(interpreter, *inputs(33, 40, 8), uses=uses, temperature=4.0)


def test_mask_heads_and_strides(interpreter):
    x = randn(2, 5, 3, 4, seed=1).float().permute(0, 2, 1, 3)[..., ::2]  # (H, 3, 5, 2)
    codebook = randn(2, 9, 2, seed=2).float().transpose(1, 2).contiguous().transpose(1, 2)  # (H, 9, 2)
    mask = rand(2, 3, 5, seed=3) < 0.7
    for metric in ops.METRICS:
        found = assert_near(interpreter, x, codebook, mask, metric=metric)
        assert not found["sample_entropy"][~mask].any() and not found["grad_x"][~mask].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_dtypes(interpreter, dtype):
    assert_near(interpreter, *inputs(17, 20, 6, dtype), temperature=2.0)
    assert_near(interpreter, inputs(17, 20, 6, dtype)[0], inputs(17, 20, 6)[1], temperature=2.0)


def test_fp64_is_the_references(interpreter):
    assert_near(interpreter, *(v / 2 for v in inputs(6, 5, 3, torch.float64)), temperature=2.0)


def test_one_code_no_rows_and_no_valid_row(interpreter):
    upstream = torch.ones(4), torch.tensor(1.0)
    for x, mask in ((torch.ones(4, 3), None), (torch.ones(4, 3), torch.zeros(4, dtype=torch.bool))):
        found = interpreter.code_entropy(x, torch.ones(1, 3), upstream, mask=mask)
        assert not any(value.any() for value in found.values())
    found = interpreter.code_entropy(torch.ones(0, 3), torch.ones(2, 3), (torch.ones(0), torch.tensor(1.0)))
    assert found["mean_entropy"] == 0 and not found["grad_codebook"].any()


def test_values_that_are_not_finite(interpreter):
    x, codebook = inputs(5, 70, 3)
    x[2, 1] = torch.nan
    found = interpreter.code_entropy(x, codebook, (torch.ones(5), torch.tensor(1.0)))
    others = torch.arange(5) != 2
    assert found["sample_entropy"][2].isnan() and found["sample_entropy"][others].isfinite().all() and found["mean_entropy"].isnan()
    masked = interpreter.code_entropy(x, codebook, (torch.ones(5), torch.tensor(1.0)), mask=others)
    assert all(value.isfinite().all() for value in masked.values())


def test_cold_scores_and_large_offsets(interpreter):
    x, codebook = inputs(20, 70, 8)
    assert_near(interpreter, x, codebook, metric="cosine", temperature=0.05)
    assert_near(interpreter, x + 1000, codebook + 1000, temperature=8.0)


def test_a_row_does_not_depend_on_its_batch(interpreter):
    x, codebook = inputs(70, 200, 5)
    upstream = torch.ones(70), torch.tensor(0.0)
    whole = interpreter.code_entropy(x, codebook, upstream, uses=NAMES[:1])
    again = interpreter.code_entropy(x, codebook, upstream, uses=NAMES[:1])
    assert all(same_bits(again[name], value) for name, value in whole.items())
    part = interpreter.code_entropy(x[63:66], codebook, (upstream[0][:3], upstream[1]), uses=NAMES[:1])
    for name in ("sample_entropy", "grad_x"):
        assert same_bits(part[name], whole[name][63:66])


# -- ahead of time ----------------------------------------------------------------------------------------------------

KERNELS = ("reduce_codes", "add_probabilities", "add_weighted", "gradients_of_rows", "gradients_of_codes")


def assert_good_code(requests):
    for (kernel, capability, dim, _), code in compiled(requests).items():
        where = f"{kernel} for sm_{capability}, D = {dim}: {code}"
        assert code["stack"] == 0 and code["spills"] == 0, where
        assert code["shared"] <= SHARED[capability] and not code["block_pointers"], where


def test_compiles_without_spills():
    """All on sm_90, and where registers are shortest on the others."""
    assert_good_code([[k, 90, 256, ""] for k in KERNELS] + [[k, c, 64, ""] for k in KERNELS[3:] for c in (80, 100)])


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_compiles_without_spills(capability):
    assert_good_code([[kernel, capability, dim, ""] for kernel in KERNELS for dim in (1, 16, 24, 32, 64, 256)])
