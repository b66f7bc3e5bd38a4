"""Every instruction set that this CPU can run: the same indices, and the amount of work that the design promises."""

import os
import subprocess
import sys

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.vq.data import DATA_SETS
from mmgen_kernels.vq import ops, reference

probe = pytest.importorskip("mmgen_kernels._probe", reason="built with MMGEN_KERNELS_PROBE=1")
SETS = probe.instruction_sets()
COARSE = ("scalar_bf16", "scalar_int16", "avx512_vnni", "avx512_bf16", "amx")


def lookup(x, codebook, metric, instruction_set, exact=True):
    indices, counters = probe.nearest_code(x.numpy(), codebook.numpy(), metric, instruction_set, exact)
    return torch.from_numpy(indices), counters


def fp32(data, *sizes):
    return DATA_SETS[data](*sizes, torch.float32, torch.float32)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", DATA_SETS)
def test_the_same_indices(data, metric, instruction_set):
    x, codebook = fp32(data, 83, 211, 20)
    indices, _ = lookup(x, codebook, metric, instruction_set)
    assert torch.equal(indices, reference.nearest_code(x, codebook, None, metric, "exact"))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("codes", (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 23, 24, 25, 48, 97))
@pytest.mark.parametrize("rows", (1, 2, 8, 15, 16, 17, 31, 32, 33, 65))
def test_edges_of_tiles(rows, codes, instruction_set):
    x, codebook = fp32("gaussian", rows, codes, 5)
    indices, _ = lookup(x, codebook, "l2", instruction_set)
    assert torch.equal(indices, reference.nearest_code(x, codebook, None, "l2", "exact"))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("data", ["gaussian", "spread", "offset", "taming"])
@pytest.mark.parametrize("dim", (1, 8, 9, 10, 29, 30, 32, 33, 61, 62, 64, 65, 200))
def test_dimensions_around_the_steps_of_a_matrix_tile(dim, data, instruction_set):
    """Up to 9 both factors are split in two, and up to 29 (61, 93, ..) the norm rides along."""
    x, codebook = fp32(data, 70, 130, dim)
    indices, _ = lookup(x, codebook, "l2", instruction_set)
    assert torch.equal(indices, reference.nearest_code(x, codebook, None, "l2", "exact"))


def test_sizes_of_several_panels_and_blocks():
    """More codes than a panel holds and more rows than a block, by every instruction set against each other."""
    x, codebook = fp32("fourfold", 700, 26_000, 4)
    found = [lookup(x, codebook, "l2", s)[0] for s in SETS]
    assert all(torch.equal(found[0], other) for other in found)
    some_rows = slice(0, 700, 50)
    assert torch.equal(found[0][some_rows], reference.nearest_code(x[some_rows], codebook, None, "l2", "exact"))


# -- work: a row's own tile is looked at again, and hardly another one ------------------------------------------------


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    ("data", "fp32_tiles", "coarse_tiles"),
    [("gaussian", 1.2, 1.5), ("normalised", 1.2, 1.5), ("offset", 1.5, 1.5), ("spread", 1.2, 1.5)],
)
def test_easy_data_is_certified_by_the_pass(data, fp32_tiles, coarse_tiles, instruction_set):
    x, codebook = fp32(data, 4096, 4096, 64)
    indices, counters = lookup(x, codebook, "l2", instruction_set)
    tiles_per_row = coarse_tiles if instruction_set in COARSE else fp32_tiles
    assert len(x) <= counters["rescored_tiles"] <= tiles_per_row * len(x)
    assert counters["deferred_rows"] == 0
    assert counters["exact_values"] <= 0.5 * len(x)
    assert counters["brute_force_rows"] == 0
    few = slice(0, 4096, 128)
    assert torch.equal(indices[few], reference.nearest_code(x[few], codebook, None, "l2", "exact"))


@pytest.mark.parametrize("instruction_set", [s for s in SETS if s in COARSE])
@pytest.mark.parametrize("panels", (1, 2))
def test_rows_that_a_coarse_pass_cannot_decide_are_left_to_fp32(panels, instruction_set):
    """Two clusters of codes that differ by less than bf16 or 16 bits resolve, and rows among them beside rows that are easy."""
    codes, dim = 13_000 * panels, 16
    centres = torch.where(torch.arange(codes) % 2 == 0, 1.0, -1.0)[:, None] * randn(1, dim, seed=1).float()
    codebook = centres + 1e-4 * randn(codes, dim, seed=2).float()
    x = torch.cat([codebook[:300] + 1e-5 * randn(300, dim, seed=3).float(), randn(700, dim, seed=4).float()])
    codebook[-5:] = x[-5:]
    indices, counters = lookup(x, codebook, "l2", instruction_set)
    assert 300 <= counters["deferred_rows"] <= len(x) and counters["brute_force_rows"] == 0
    assert torch.equal(indices, lookup(x, codebook, "l2", "scalar")[0])
    few = torch.cat([torch.arange(0, 300, 25), torch.arange(995, 1000)])
    assert torch.equal(indices[few], reference.nearest_code(x[few], codebook, None, "l2", "exact"))


@pytest.mark.parametrize("instruction_set", [s for s in SETS if s in COARSE])
def test_one_code_in_every_tile_is_no_reason_to_defer(instruction_set):
    """Zero is the nearest code of most rows here and stands in each tile: its copies go, and the pass decides."""
    x, codebook = fp32("gaussian", 1024, 4096, 64)
    codebook[::8] = 0
    indices, counters = lookup(x, codebook, "l2", instruction_set)
    assert counters["deferred_rows"] == 0
    assert torch.equal(indices, lookup(x, codebook, "l2", "scalar")[0])


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("metric", ops.METRICS)
@pytest.mark.parametrize("data", ["all_equal", "fourfold", "all_zero"])
def test_duplicates_are_not_evaluated_over_and_over(data, metric, instruction_set):
    """2048 equal codes cost 4 million evaluations if every row meets all of them."""
    x, codebook = fp32(data, 2048, 2048, 16)
    indices, counters = lookup(x, codebook, metric, instruction_set)
    assert counters["exact_values"] <= 20 * len(x)
    assert torch.equal(indices[:32], reference.nearest_code(x[:32], codebook, None, metric, "exact"))


@pytest.mark.parametrize("instruction_set", SETS)
def test_zero_rows_are_answered_once(instruction_set):
    """All codes of a normalised codebook tie, to within rounding, for a row of zeros: padding must not be the slow case."""
    x, codebook = torch.zeros(2048, 16), fp32("normalised", 1, 1024, 16)[1]
    indices, counters = lookup(x, codebook, "l2", instruction_set)
    assert counters["exact_values"] <= 2 * len(codebook)
    assert torch.equal(indices[:1], reference.nearest_code(x[:1], codebook, None, "l2", "exact")) and len(indices.unique()) == 1


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("data", ["huge", "tiny", "nan_rows", "inf_rows", "nan_codes"])
def test_hard_values_need_no_brute_force(data, instruction_set):
    x, codebook = fp32(data, 512, 512, 16)
    _, counters = lookup(x, codebook, "l2", instruction_set)
    assert counters["brute_force_rows"] == 0 and counters["exact_values"] <= len(x)


@pytest.mark.parametrize("instruction_set", SETS)
def test_rows_and_codes_of_every_magnitude_need_no_brute_force(instruction_set):
    """For rows 2^53 times as long as the codes all fp64 distances tie; those and no others need every code in fp64."""
    x, codebook = fp32("mixed_rows", 512, 512, 16)
    _, counters = lookup(x, codebook, "l2", instruction_set)
    far = int((x.double().norm(dim=1) > 1e8).sum())
    assert counters["brute_force_rows"] == 0 and counters["exact_values"] <= far * len(codebook)


PRODUCTS = {
    "gaussian": lambda dim, seed: (randn(dim, seed=seed), randn(dim, seed=seed + 100)),
    # bf16 leaves out as much as it can, 2^-8 of each component, and what two parts leave out is the product of these
    "halfway": lambda dim, seed: (torch.full((dim,), 1 + 2.0**-8), torch.full((dim,), (-1.0) ** seed * (1 + 2.0**-8))),
    "offset": lambda dim, seed: (100 + randn(dim, seed=seed), 100 + randn(dim, seed=seed + 100)),
}


@pytest.mark.parametrize("data", PRODUCTS)
@pytest.mark.parametrize("dim", (1, 2, 8, 9, 10, 31, 100))
def test_what_bf16_leaves_out_is_within_its_bound(dim, data):
    """The products of a row and a code against the bound that certifies them; the sums' own roundings are not in either."""
    for seed in range(20):
        x, c = (v.float().double() for v in PRODUCTS[data](dim, seed))
        products, of_row, of_code = probe.bf16_product(x.tolist(), c.tolist())
        bound = of_row * c.norm() + (x.norm() + of_row) * of_code
        assert abs(products - x.dot(c)) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("instruction_set", SETS)
def test_fast_evaluates_nothing_in_fp64(instruction_set):
    x, codebook = fp32("gaussian", 512, 512, 16)
    indices, counters = lookup(x, codebook, "l2", instruction_set, exact=False)
    assert counters["exact_values"] == 0
    assert (indices == lookup(x, codebook, "l2", instruction_set)[0]).float().mean() > 0.99


# -- the choice from outside ------------------------------------------------------------------------------------------

SELECT = """
import torch, mmgen_kernels as mk
from mmgen_kernels import _probe
from mmgen_kernels.battery.vq.data import DATA_SETS
x, codebook = DATA_SETS["near_ties"](65, 97, 16, torch.float32, torch.float32)
with mk.use_backend("cpp"):
    print(_probe.selected(), mk.nearest_code(x, codebook).tolist())
"""


def run(code, **environment):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MMGEN_KERNELS_")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("instruction_set", SETS)
def test_named_by_the_environment(instruction_set):
    x, codebook = fp32("near_ties", 65, 97, 16)
    done = run(SELECT, MMGEN_KERNELS_CPU=instruction_set)
    truth = reference.nearest_code(x, codebook, None, "l2", "exact").tolist()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{instruction_set} {truth}"


NAMES = "scalar, scalar_bf16, scalar_int16, avx2, avx512, avx512_vnni, avx512_bf16 or amx"


def test_unknown_name_in_the_environment():
    done = run("import torch, mmgen_kernels as mk; mk.nearest_code(torch.ones(1, 1), torch.ones(1, 1))", MMGEN_KERNELS_CPU="avx9")
    assert done.returncode == 1
    assert f"MMGEN_KERNELS_CPU must be {NAMES}, got 'avx9'" in done.stderr.strip().splitlines()[-1]


def test_unknown_names_of_the_probe():
    x = torch.ones(1, 1)
    with pytest.raises(ValueError, match=f"{NAMES}, got 'sse'"):
        lookup(x, x, "l2", "sse")
    assert probe.selected() in SETS


@pytest.mark.skipif("avx512" not in SETS, reason="needs a CPU with AVX-512")
def test_the_operator_and_the_probe_agree():
    x, codebook = randn(500, 24, seed=1).float(), randn(300, 24, seed=2).float()
    with mk.use_backend("cpp"):
        assert torch.equal(mk.nearest_code(x, codebook), lookup(x, codebook, "l2", probe.selected())[0])
