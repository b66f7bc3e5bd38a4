"""What trains a codebook, beyond the battery's cases: torch's transforms, bad input, k-means, and runs that repeat to the bit."""

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import rand, randint, randn
from mmgen_kernels.battery.vq.data import DATA_SETS

IMPLEMENTATIONS = battery.implementations("code_statistics", torch.device("cpu"))
KEY = torch.tensor([3, 5])


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with mk.use_backend(request.param):
        yield request.param


def trained(*lead):
    return randn(*lead, 7, 4, seed=1).float(), rand(*lead, 7, seed=2).float() * 4, randn(*lead, 7, 4, seed=3).float()


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", (False, True))
def test_gradcheck(implementation, heads):
    lead = (2,) if heads else ()
    x, codebook = randn(*lead, 6, 3, seed=1).requires_grad_(), randn(*lead, 4, 3, seed=2).requires_grad_()
    indices, mask = randint(-1, 5, (*lead, 6), 3), rand(*lead, 6, seed=4) < 0.7
    torch.autograd.gradcheck(lambda c: mk.gather_codes(c, indices), codebook)
    torch.autograd.gradcheck(lambda r: mk.code_statistics(r, indices, 4, mask=mask, heads=heads).sums, x)


def test_gathering_and_adding_up_are_adjoint(implementation):
    """<gather(c), x> = <c, sums(x)>, so that each is the gradient of the other."""
    x, codebook, indices = randn(50, 5, seed=1), randn(7, 5, seed=2), randint(-1, 8, (50,), 3)
    sums = mk.code_statistics(x, indices, 7).sums
    torch.testing.assert_close((mk.gather_codes(codebook, indices) * x).sum(), (codebook * sums).sum())


def test_a_second_derivative_is_refused(implementation):
    codebook = randn(7, 5, seed=2).requires_grad_()
    (grad,) = torch.autograd.grad(mk.gather_codes(codebook, randint(0, 7, (9,), 3)).square().sum(), codebook, create_graph=True)
    with pytest.raises(RuntimeError, match="gather_codes_backward has no derivative"):
        grad.sum().backward()


# -- writing in place -------------------------------------------------------------------------------------------------


def test_what_autograd_saved_and_an_average_overwrote_is_noticed(implementation):
    codebook, size, total = trained()
    weight = torch.ones(4, requires_grad=True)
    product = codebook * weight  # saves the codebook
    mk.update_codebook_ema_(codebook, size, total, torch.ones(7), torch.ones(7, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_gathered_codebook_may_be_overwritten_before_the_backward(implementation):
    codebook, size, total = trained()
    codebook.requires_grad_()
    codes = mk.gather_codes(codebook, torch.tensor([1, 1, 3]))
    with torch.no_grad():
        mk.update_codebook_ema_(codebook, size, total, torch.ones(7), torch.ones(7, 4))
    codes.sum().backward()
    assert codebook.grad[:, 0].tolist() == [0, 2, 0, 1, 0, 0, 0]


def test_compiled(implementation):
    """One graph, dynamic shapes, averages written in place."""

    def step(x, codebook, size, total):
        out = mk.vector_quantize(x, codebook)
        counts, sums = mk.code_statistics(x, out.indices, codebook.shape[0])
        mk.update_codebook_ema_(codebook, size, total, counts, sums, decay=0.9)
        mk.replace_dead_codes_(codebook, size, total, x, KEY, threshold=1.0)
        return mk.gather_codes(codebook, out.indices)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 31):
        x = randn(rows, 4, seed=9).float()
        ours, expected = trained(), trained()
        assert torch.equal(compiled(x, *ours), step(x, *expected))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_vmap(implementation):
    x, indices = randn(3, 9, 4, seed=1).float(), randint(-1, 8, (3, 9), 2)
    codebook = randn(7, 4, seed=3).float()
    counts, sums = torch.vmap(lambda r, i: tuple(mk.code_statistics(r, i, 7)))(x, indices)
    codes = torch.vmap(lambda i: mk.gather_codes(codebook, i))(indices)
    for b in range(3):
        assert torch.equal(sums[b], mk.code_statistics(x[b], indices[b], 7).sums)
        assert torch.equal(counts[b], mk.code_statistics(x[b], indices[b], 7).counts)
        assert torch.equal(codes[b], mk.gather_codes(codebook, indices[b]))


def test_vmap_writes_what_is_batched_and_refuses_what_is_not(implementation):
    books, alone = trained(3), trained()
    counts, sums = torch.ones(3, 7), randn(3, 7, 4, seed=4).float()
    expected = [t.clone() for t in books]
    for b in range(3):
        mk.update_codebook_ema_(*(t[b] for t in expected), counts[b], sums[b])

    def step(codebook, size, total, counts, sums):
        mk.update_codebook_ema_(codebook, size, total, counts, sums)
        return codebook

    assert torch.equal(torch.vmap(step)(*books, counts, sums), expected[0])
    assert all(torch.equal(a, b) for a, b in zip(books, expected, strict=True))
    with pytest.raises(ValueError, match="writes codebook, cluster_size, code_sum, which must be batched"):
        torch.vmap(lambda c, s: step(*alone, c, s))(counts, sums)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_sums_of_parts_in_fp64_are_the_sum_of_the_whole(implementation):
    """What ranks do: add up in fp64, round once."""
    x, indices = randn(4096, 24, seed=1).float(), randint(0, 50, (4096,), 2)
    whole = mk.code_statistics(x, indices, 50)
    parts = [mk.code_statistics(*p, 50, dtype=torch.float64) for p in zip(x.chunk(4), indices.chunk(4), strict=True)]
    assert torch.equal(sum(p.sums for p in parts).float(), whole.sums)
    assert torch.equal(sum(p.counts for p in parts), whole.counts)


def test_sums_stay_in_fp32_or_better_for_half_precision(implementation):
    x, indices = torch.full((5000, 2), 1.0078125, dtype=torch.bfloat16), torch.zeros(5000, dtype=torch.int64)
    assert mk.code_statistics(x, indices, 1).sums.tolist() == [[5000 * 1.0078125] * 2]


def test_dead_codes_get_different_rows_in_random_order():
    """Every row once before any twice, and another key gives another order."""
    rows = torch.arange(64.0)[:, None].expand(64, 3)
    drawn = []
    for key in (KEY, KEY + 1):
        codebook, size, total = torch.zeros(64, 3), torch.zeros(64), torch.zeros(64, 3)
        mk.replace_dead_codes_(codebook, size, total, rows, key, threshold=1.0)
        drawn.append(codebook[:, 0].tolist())
        assert sorted(drawn[-1]) == rows[:, 0].tolist() and (size == 1).all()
    assert drawn[0] != drawn[1] != rows[:, 0].tolist()


def test_every_row_is_as_likely_as_any_other():
    """Who gets the only dead code: 4000 draws among 8 rows, chi-square below its 99.9th percentile (7 degrees of freedom)."""
    keys = mk.fold_in(KEY, torch.arange(4000))
    counts = torch.zeros(8)
    rows = torch.arange(8.0)[:, None]
    for key in keys:
        codebook, size, total = torch.zeros(2, 1), torch.tensor([0.0, 9.0]), torch.zeros(2, 1)
        mk.replace_dead_codes_(codebook, size, total, rows, key, threshold=1.0)
        counts[int(codebook[0])] += 1
    assert ((counts - 500).square() / 500).sum() < 24.3


# -- k-means ----------------------------------------------------------------------------------------------------------


def lloyd(x, codes, iterations):
    """In fp64, with the distance matrix."""
    for _ in range(iterations):
        nearest = (x[:, None] - codes[None]).square().sum(-1).argmin(1)
        codes = torch.stack([x[nearest == k].mean(0) if (nearest == k).any() else c for k, c in enumerate(codes)])
    return codes, torch.bincount(nearest, minlength=len(codes))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_kmeans_is_lloyds(implementation, dtype):
    x = randn(300, 5, seed=1) + 4 * randn(6, 5, seed=2)[randint(0, 6, (300,), 3)]
    start = x[:11].clone()
    codes, counts = mk.kmeans(x.to(dtype), 11, None, init=start.to(dtype), iterations=7)
    expected, sizes = lloyd(x.to(dtype).double(), start.to(dtype).double(), 7)
    assert torch.equal(counts, sizes) and codes.dtype == dtype
    torch.testing.assert_close(codes.double(), expected, rtol=1e-6, atol=1e-6)


def test_kmeans_starts_from_different_rows_and_repeats(implementation):
    x = torch.arange(40.0)[:, None]
    start = mk.kmeans(x, 40, KEY, iterations=0).codebook
    assert sorted(start[:, 0].tolist()) == x[:, 0].tolist()
    more = mk.kmeans(x[:3], 7, KEY, iterations=0).codebook[:, 0].tolist()
    assert more == (more[:3] * 3)[:7] and sorted(more[:3]) == [0, 1, 2]
    x = randn(500, 6, seed=3).float()
    assert all(torch.equal(mk.kmeans(x, 16, KEY).codebook, mk.kmeans(x, 16, KEY).codebook) for _ in range(3))


def test_kmeans_with_heads_and_mask_is_kmeans_of_each(implementation):
    x, mask = randn(2, 60, 3, seed=1).float(), rand(2, 60, seed=2) < 0.6
    start = randn(2, 5, 3, seed=4).float()
    codes, counts = mk.kmeans(x, 5, None, init=start, heads=True, mask=mask)
    for h in range(2):
        alone = mk.kmeans(x[h][mask[h]], 5, None, init=start[h])
        assert torch.equal(counts[h], alone.counts)
        torch.testing.assert_close(codes[h], alone.codebook)
    drawn = mk.kmeans(x, 5, KEY, heads=True, mask=mask, iterations=0).codebook
    assert all((x[h][mask[h]] == drawn[h, k]).all(-1).any() for h in range(2) for k in range(5))


def test_kmeans_on_the_sphere(implementation):
    x = torch.nn.functional.normalize(randn(200, 4, seed=1).float(), dim=-1)
    codes = mk.kmeans(3 * x, 9, KEY, metric="cosine").codebook
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(9))
    assert (x @ codes.T).amax(-1).mean() > (x @ x[:9].T).amax(-1).mean()


# -- runs that repeat -------------------------------------------------------------------------------------------------


def test_fifty_steps_end_in_the_same_bits_twenty_times(implementation):
    """Averages, dead codes and threads: a run is a function of its data and its key."""

    def run(threads):
        torch.set_num_threads(threads)
        x, codebook = DATA_SETS["gaussian"](256, 64, 8, torch.float32, torch.float32)
        size, total = torch.ones(64), codebook.clone()
        for step in range(50):
            rows = x * (1 + step / 50)
            indices = mk.nearest_code(rows, codebook)
            mk.update_codebook_ema_(codebook, size, total, *mk.code_statistics(rows, indices, 64), decay=0.9)
            mk.replace_dead_codes_(codebook, size, total, rows, mk.fold_in(KEY, step), threshold=0.5)
        return codebook

    first = run(1)
    assert all(torch.equal(first, run(1 + i % 2)) for i in range(20 if implementation == "cpp" else 2))


# -- bad input --------------------------------------------------------------------------------------------------------

X, IDX, C = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), torch.zeros(7, 4)
SIZE, SUM = torch.zeros(7), torch.zeros(7, 4)
META = torch.device("meta")
STATISTICS = {
    "indices_float": (
        lambda: mk.code_statistics(X, IDX.float(), 7),
        TypeError,
        "indices must be an int64 tensor, got torch.float32",
    ),
    "indices_shape": (
        lambda: mk.code_statistics(X, IDX[:4], 7),
        ValueError,
        r"indices must have x's leading shape \(5,\), got \(4,\)",
    ),
    "indices_device": (lambda: mk.code_statistics(X, IDX.to(META), 7), ValueError, "indices must be on x's device cpu, got meta"),
    "x_int": (lambda: mk.code_statistics(X.int(), IDX, 7), TypeError, "x must be float64, .*got torch.int32"),
    "no_codes": (lambda: mk.code_statistics(X, IDX, 0), ValueError, r"num_codes must be 1 to 2\^31 - 1, got 0"),
    "codes_float": (lambda: mk.code_statistics(X, IDX, 7.0), TypeError, "num_codes must be an int, got float"),
    "heads_int": (lambda: mk.code_statistics(X, IDX, 7, heads=1), TypeError, "heads must be a bool, got int"),
    "heads_rank": (
        lambda: mk.code_statistics(X[0], IDX[0], 7, heads=True),
        ValueError,
        r"x must be \(H, ..., D\), got shape \(4,\)",
    ),
    "dtype": (
        lambda: mk.code_statistics(X, IDX, 7, dtype=torch.bfloat16),
        TypeError,
        "dtype must be torch.float32 or torch.float64",
    ),
    "mask": (lambda: mk.code_statistics(X, IDX, 7, mask=IDX), TypeError, "mask must be a bool tensor, got torch.int64"),
    "gather_heads": (lambda: mk.gather_codes(C[None], IDX), ValueError, r"indices must be \(H, ...\) with H = 1"),
    "gather_indices": (lambda: mk.gather_codes(C, [0]), TypeError, "indices must be an int64 tensor, got list"),
    "gather_codebook": (lambda: mk.gather_codes(C[0], IDX), ValueError, r"codebook must be \(K, D\) or \(H, K, D\)"),
    "size_shape": (
        lambda: mk.update_codebook_ema_(C, SIZE[:3], SUM, SIZE, SUM),
        ValueError,
        r"cluster_size must have shape \(7,\)",
    ),
    "size_int": (lambda: mk.update_codebook_ema_(C, SIZE.int(), SUM, SIZE, SUM), TypeError, "cluster_size must be float64"),
    "sum_shape": (lambda: mk.update_codebook_ema_(C, SIZE, SUM.T, SIZE, SUM), ValueError, r"code_sum must have shape \(7, 4\)"),
    "sums_shape": (
        lambda: mk.update_codebook_ema_(C, SIZE, SUM, SIZE, SUM[0]),
        ValueError,
        r"sums must have shape \(7, 4\), got \(4,\)",
    ),
    "counts_none": (lambda: mk.update_codebook_ema_(C, SIZE, SUM, None, SUM), TypeError, "counts must be a tensor of numbers"),
    "decay": (lambda: mk.update_codebook_ema_(C, SIZE, SUM, SIZE, SUM, decay=1.5), ValueError, "decay must be 0 to 1, got 1.5"),
    "decay_none": (lambda: mk.update_codebook_ema_(C, SIZE, SUM, SIZE, SUM, decay=None), TypeError, "decay must be a number"),
    "strided": (
        lambda: mk.update_codebook_ema_(torch.zeros(4, 7).T, SIZE, SUM, SIZE, SUM),
        ValueError,
        "codebook must be contiguous to be written",
    ),
    "gradient": (
        lambda: mk.update_codebook_ema_(torch.zeros(7, 4, requires_grad=True), SIZE, SUM, SIZE, SUM),
        ValueError,
        "codebook must not require a gradient to be written",
    ),
    "key_shape": (
        lambda: mk.replace_dead_codes_(C, SIZE, SUM, X, KEY[:1], threshold=1),
        ValueError,
        r"key must be \(seed, offset\)",
    ),
    "key_float": (
        lambda: mk.replace_dead_codes_(C, SIZE, SUM, X, KEY.float(), threshold=1),
        TypeError,
        "key must be an int64 tensor",
    ),
    "rows_dim": (
        lambda: mk.replace_dead_codes_(C, SIZE, SUM, X[:, :3], KEY, threshold=1),
        ValueError,
        "x must hold rows of codebook",
    ),
    "threshold": (lambda: mk.replace_dead_codes_(C, SIZE, SUM, X, KEY, threshold="1"), TypeError, "threshold must be a number"),
    "kmeans_key": (lambda: mk.kmeans(X, 3, None), TypeError, "key must be an int64 tensor .* got None and no init"),
    "kmeans_init": (lambda: mk.kmeans(X, 3, None, init=C), ValueError, r"init must have shape \(3, 4\), got \(7, 4\)"),
    "kmeans_iterations": (lambda: mk.kmeans(X, 3, KEY, iterations=-1), ValueError, "iterations must be >= 0, got -1"),
    "kmeans_metric": (lambda: mk.kmeans(X, 3, KEY, metric="dot"), ValueError, "metric must be one of l2, cosine, got 'dot'"),
    "kmeans_no_rows": (lambda: mk.kmeans(X[:0], 3, KEY), ValueError, "x must hold at least one row"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATISTICS)
def test_bad_input(name):
    call, error, message = STATISTICS[name]
    with pytest.raises(error, match=message):
        call()
