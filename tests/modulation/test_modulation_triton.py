"""The Triton kernels of the family by the interpreter, without a GPU: against the reference, and what they promise of bits.

Each test runs in a process in which TRITON_INTERPRET is set, or there needs none.
"""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels.battery import tolerance
from mmgen_kernels.modulation import ops, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
from triton_interpreter import is_interpreted, prepare_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SIZES = (384, 768, 1024, 1152, 1408, 1536, 1920, 2048, 2240, 2304, 2432, 3072, 3840, 5120, 6144)
VECTORS = ("gate", "shift", "scale", "shift_2", "scale_2")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def process():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
        assert pool.submit(is_interpreted).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    yield pool
    pool.shutdown()


# -- inputs and runs --------------------------------------------------------------------------------------------------


def random(*shape, seed, dtype=F32, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=F64) + mean).to(dtype)


def near_one(D, seed, dtype=F32):
    """As weights are. A product of several normals has a few extremes, and whose rounding is luckier is then a matter of chance."""
    return (1 + random(D, seed=seed, dtype=F64) / 8).to(dtype)


def vectors_of(address, B, T, D, dtype, seed=10):
    """gate, shift, scale, shift_2, scale_2, views of one tensor where they are of one kind, and rows."""
    if address == "shared":
        return (random(5, D, seed=seed, dtype=dtype) / 8).unbind(), None
    if address == "sample":
        return (random(B, 6 * D, seed=seed, dtype=dtype) / 8).chunk(6, 1)[:5], None
    if address == "frame":
        return (random(B, T // 3, 9 * D, seed=seed, dtype=dtype) / 8).chunk(9, 2)[:5], None
    if address == "token":
        return (random(B, T, 6 * D, seed=seed, dtype=dtype) / 8).chunk(6, 2)[:5], None
    one = [random(*shape, seed=seed + i, dtype=dtype) / 8 for i, shape in enumerate(((B, T, D), (B, D), (D,)))]
    if address == "mixed":
        return [one[1], one[0], one[2], random(B, T // 3, D, seed=seed + 3, dtype=dtype), random(1, D, seed=seed + 4)], None
    rows = torch.randint(-2, 9, (B, T), generator=torch.Generator().manual_seed(seed))  # some out of range
    rows[rows == 4] = 2  # and a row that no token takes
    counts = (7, 7, 3, 1)
    tables = [random(R, D, seed=seed + i, dtype=dtype) / 8 for i, R in enumerate(counts)]
    return [tables[0], tables[1], tables[2], one[2], tables[3]], rows.int() if address == "row32" else rows


def run(
    dims=(3, 7, 300),
    address="sample",
    dtypes=(F32, F32, F32),
    operator="gate_residual_adaln",
    gate_fn="identity",
    post_norm=None,
    norm="layer",
    without=(),
    affine=False,
    table=False,
    two=False,
    out=None,
    mean=0.0,
):
    """(inputs by name, a function of them that gives results and gradients by name); dtypes of x, y, vectors."""
    B, T, D = dims
    x_dtype, y_dtype, dtype = dtypes
    found, rows = vectors_of(address, B, T, D, dtype)
    inputs = {"x": random(B, T, D, seed=1, dtype=x_dtype, mean=mean)}
    inputs |= {n: v for n, v in zip(VECTORS, found, strict=True) if n not in without and (two or "_2" not in n)}
    if operator == "gate_residual":
        inputs = {n: v for n, v in inputs.items() if n in ("x", "gate")}
    if operator == "adaln":
        inputs.pop("gate", None)
    else:
        inputs["y"] = random(B, T, D, seed=2, dtype=y_dtype)
    if table:
        inputs["table"] = random(sum(n in VECTORS for n in inputs), D, seed=3) / 8
    if affine and operator != "gate_residual":
        inputs |= {"weight": near_one(D, seed=4), "bias": random(D, seed=5, dtype=F16)}
    if post_norm:
        inputs["post_weight"] = near_one(D, seed=6)
    upstream = [random(B, T, D, seed=20 + i).sign() * near_one(D, seed=30) for i in range(3)]

    def call(given):
        given = {n: t.detach().requires_grad_() for n, t in given.items()}
        wide = given["x"].dtype == F64
        options = {"table": given.get("table"), "rows": rows}
        if operator != "adaln":
            options |= {"gate_fn": gate_fn, "post_norm": post_norm, "post_weight": given.get("post_weight")}
        if operator != "gate_residual":
            options |= {"norm": norm, "weight": given.get("weight"), "bias": given.get("bias"), "dtype": None if wide else out}
            shift, scale = given.get("shift"), given.get("scale")
            if two:
                shift, scale = (shift, given.get("shift_2")), (scale, given.get("scale_2"))
        if operator == "adaln":
            results = ops.adaln(given["x"], shift, scale, **options)
        elif operator == "gate_residual":
            results = ops.gate_residual(given["x"], given["y"], given.get("gate"), **options)
        else:
            residual, modulated = ops.gate_residual_adaln(given["x"], given["y"], given.get("gate"), shift, scale, **options)
            results = (residual, *modulated) if two else (residual, modulated)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(results, list(given.values()), [u.to(r.dtype) for u, r in zip(upstream, results, strict=False)])
        answer = {f"result {i}": r.detach() for i, r in enumerate(results)}
        return answer | {f"gradient of {n}": g for n, g in zip(given, grads, strict=True)}

    return inputs, call


def by(implementation, call, inputs):
    with mk.use_backend(implementation):
        return call(inputs)


def assert_law(**options):
    """fp32 and fp64 results by the tolerance law. Of half precision the reference's bits: where both round once, they may differ
    by a unit in the last place and only where fp32 was a hair from a tie."""
    inputs, call = run(**options)
    ours, plain = by("triton", call, inputs), by("reference", call, inputs)
    truth = by("reference", call, {n: t.double() for n, t in inputs.items()})
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        if value.dtype in (BF16, F16):
            difference = (value.double() - plain[name].double()).abs()
            unit = tolerance.ulp(plain[name].double(), value.dtype) + 1e-6 * plain[name].double().abs().max()
            assert (difference <= unit).all(), name
            assert (difference > 0).double().mean() <= 0.02, name
        elif value.dtype == F64 and F32 in options["dtypes"][:2]:  # what is computed in fp32 is no better for being stored so
            failed = tolerance.failure(name, value.float(), plain[name].float(), truth[name])[1]
            assert failed is None, failed
        elif options.get("dtypes", (F32,))[0] in (BF16, F16):  # fp32 of a residual that was rounded in between
            error, allowed = (value - plain[name]).abs().max(), plain[name].abs().max()
            assert error <= 1e-5 * allowed, (name, error, allowed)
        else:
            failed = tolerance.failure(name, value, plain[name], truth[name])[1]
            assert failed is None, failed


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


# -- against the reference --------------------------------------------------------------------------------------------

OPTIONS = {
    "DiT": {},
    "frames, tanh, sandwich, rms": {"address": "frame", "dims": (3, 6, 300), "gate_fn": "tanh", "post_norm": "rms", "norm": "rms"},
    "tokens, table, two outputs, affine": {"address": "token", "table": True, "two": True, "affine": True, "post_norm": "layer"},
    "mixed, table, two outputs, affine": {
        "address": "mixed", "dims": (3, 6, 300), "table": True, "two": True, "affine": True, "gate_fn": "sigmoid_one_minus"
    },
    "rows of int32, table, two outputs": {"address": "row32", "table": True, "two": True, "dims": (3, 20, 300)},
    "rows of int64, affine, sandwich": {"address": "row64", "affine": True, "post_norm": "layer", "gate_fn": "tanh"},
    "all shared, affine, rms": {"address": "shared", "affine": True, "norm": "rms", "table": True, "dims": (3, 15, 300)},
    "no vectors but the gate": {"without": ("shift", "scale"), "table": True, "post_norm": "rms"},
    "no gate, no shift": {"without": ("gate", "shift"), "table": True},
    "only a second scale": {"without": ("shift", "scale", "shift_2"), "two": True, "table": True},
    "bf16 but for the vectors": {"dtypes": (BF16, BF16, F32), "table": True, "affine": True},
    "all of bf16": {"dtypes": (BF16, BF16, BF16), "post_norm": "rms", "gate_fn": "tanh"},
    "fp16 and bf16": {"dtypes": (F16, BF16, F16), "gate_fn": "sigmoid_one_minus"},
    "autocast": {"dtypes": (F32, BF16, F32), "out": BF16},
    "fp64": {"dtypes": (F64, F64, F64), "gate_fn": "tanh", "post_norm": "layer", "table": True, "affine": True},
    "fp64 into fp32": {"dtypes": (F32, F64, F32), "affine": True},
    "fp32 into fp64": {"dtypes": (F64, F32, BF16), "post_norm": "rms", "gate_fn": "sigmoid_one_minus"},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_the_seam(process, options):
    process.submit(assert_law, **OPTIONS[options]).result()


@pytest.mark.parametrize("options", ("DiT", "tokens, table, two outputs, affine", "rows of int32, table, two outputs", "autocast"))
def test_adaln(process, options):
    kept = {n: v for n, v in OPTIONS[options].items() if n not in ("gate_fn", "post_norm")}
    process.submit(assert_law, operator="adaln", **kept).result()


@pytest.mark.parametrize("options", ("DiT", "frames, tanh, sandwich, rms", "rows of int64, affine, sandwich", "autocast"))
def test_gate_residual(process, options):
    kept = {n: v for n, v in OPTIONS[options].items() if n not in ("out", "affine", "norm")}
    process.submit(assert_law, operator="gate_residual", **kept).result()


@pytest.mark.parametrize(("T", "D", "dtype"), ((1, 200, F32), (255, 24, F64), (256, 100, F32), (257, 24, F64)))
def test_lengths(process, T, D, dtype):
    process.submit(assert_law, dims=(3, T, D), table=True, dtypes=(dtype,) * 3).result()


@pytest.mark.parametrize("D", (1, 3, 130, 1152))
def test_hidden_sizes(process, D):
    """D = 130 has a tile of two columns, 1152 is 1024 + 128. fp64 where so few numbers would be a matter of luck in fp32."""
    process.submit(assert_law, dims=(3, 2, D), post_norm="rms", dtypes=(F32,) * 3 if D > 3 else (F64,) * 3).result()


@pytest.mark.parametrize("operator", ("adaln", "gate_residual_adaln"))
def test_a_mean_a_thousand_deviations_from_zero(process, operator):
    process.submit(assert_law, operator=operator, dims=(3, 4, 300), mean=1000.0).result()


def test_tanh_near_zero_and_far(process):
    process.submit(tanh_is_right).result()


def tanh_is_right():
    for dtype, error in ((F32, 4e-7), (F64, 1e-15)):
        gate = torch.cat((torch.logspace(-30, 2.3, 400, dtype=dtype), torch.linspace(0.4, 0.8, 200, dtype=dtype)))
        gate = torch.cat((gate, -gate, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)))
        x, y = torch.zeros(1, 2, len(gate), dtype=dtype), torch.ones(1, 2, len(gate), dtype=dtype)
        with mk.use_backend("triton"):
            found = ops.gate_residual(x, y, gate, gate_fn="tanh")[0, 0]
        expected = gate.double().tanh()
        near = ((found - expected).abs() <= error * expected.abs()) | (found.isnan() & expected.isnan())
        assert near.all(), gate[~near]


# -- bits -------------------------------------------------------------------------------------------------------------


def test_repeatable_and_independent_of_the_batch(process):
    process.submit(batch_independent).result()


def batch_independent():
    """The second sample alone, results and gradients of its own vectors; and all of it twice. T = 70 is several chunks."""
    B, T, D = 3, 70, 20
    x, y, upstream = random(B, T, D, seed=1), random(B, T, D, seed=2, dtype=BF16), random(B, T, D, seed=3)
    vectors = random(B, 6 * D, seed=4)

    def call(part):
        given = [t[part].clone().requires_grad_() for t in (x, y)]
        views = [v.clone().requires_grad_() for v in vectors[part].chunk(6, 1)[:3]]
        with mk.use_backend("triton"):
            out = ops.gate_residual_adaln(*given, views[0], views[1], views[2], gate_fn="tanh")
        return [*out, *torch.autograd.grad(out, given + views, (upstream[part], upstream[part]))]

    everything, again, alone = call(slice(None)), call(slice(None)), call(slice(1, 2))
    for whole, second, one in zip(everything, again, alone, strict=True):
        assert torch.equal(whole, second)
        assert torch.equal(whole[1:2], one)


@pytest.mark.parametrize("options", ("DiT", "bf16 but for the vectors", "rows of int32, table, two outputs"))
def test_the_seam_is_its_two_halves(process, options):
    process.submit(seam_is_two_halves, OPTIONS[options] | {"dims": (3, 5, 300)}).result()


def seam_is_two_halves(options):
    inputs, _ = run(**options)
    B, T, D = options["dims"]
    vectors, rows = vectors_of(options.get("address", "sample"), B, T, D, options.get("dtypes", (F32,) * 3)[2])
    table = inputs.get("table")
    of_gate, of_norm = (None, None) if table is None else (table[:1], table[1:])
    norm = {n: inputs.get(n) for n in ("weight", "bias")}
    with mk.use_backend("triton"):
        residual, modulated = ops.gate_residual_adaln(
            inputs["x"], inputs["y"], vectors[0], vectors[1:4:2], vectors[2:5:2], table=extended(table, 5), rows=rows, **norm
        )
        alone = ops.gate_residual(inputs["x"], inputs["y"], vectors[0], table=of_gate, rows=rows)
        two = ops.adaln(alone, vectors[1:4:2], vectors[2:5:2], table=extended(of_norm, 4), rows=rows, **norm)
    assert torch.equal(residual, alone)
    assert all(torch.equal(a, b) for a, b in zip(modulated, two, strict=True))


def extended(table, count):
    return None if table is None else torch.cat((table, random(5, table.shape[1], seed=99)))[:count]


@pytest.mark.parametrize("parts", (6, 9))
def test_views_are_read_in_place(process, parts):
    process.submit(views_in_place, parts).result()


def views_in_place(parts):
    from mmgen_kernels.modulation.triton_kernels import tiles

    B, T, D = 3, 6, 20
    x, y = random(B, T, 3 * D, seed=1)[..., D : 2 * D], random(T, B, D, seed=2).transpose(0, 1)
    views = random(B, 3, parts * D, seed=3).chunk(parts, 2)[parts - 3 :]
    for tensor in (x, y):
        assert tiles.activation(tensor)[0] is tensor
    for view in views:
        assert tiles.vector_arguments(view, T, False) == (view, 3 * parts * D, parts * D, 2)
    before = [t.clone() for t in (x, y, *views)]
    with mk.use_backend("triton"):
        found = ops.gate_residual_adaln(x, y, *views)
        expected = ops.gate_residual_adaln(x.contiguous(), y.contiguous(), *(v.contiguous() for v in views))
        odd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, y, *views)]  # the last is not contiguous: one copy
        assert not any(t.stride(-1) == 1 for t in odd)
        copied = ops.gate_residual_adaln(*odd)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(found, expected, copied, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, *views), strict=True))


# -- the rest of the contract -----------------------------------------------------------------------------------------


def test_launches(process):
    process.submit(count_launches).result()


def count_launches():
    from mmgen_kernels.modulation.triton_kernels import backward, forward, sums

    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel.__name__)
            return self.kernel[grid]

    for module, name in ((forward, "modulate_tokens"), (backward, "backward_chunks"), (sums, "sum_chunks")):
        setattr(module, name, Counted(getattr(module, name)))
    try:
        for options, expected in (
            ({"table": True, "two": True, "affine": True}, ["modulate_tokens", "backward_chunks", "sum_chunks"]),
            ({"address": "token"}, ["modulate_tokens", "backward_chunks"]),
            ({"dims": (3, 0, 12), "affine": True}, []),
            ({"dims": (0, 4, 12), "address": "row32", "table": True}, []),
        ):
            launched.clear()
            inputs, call = run(**options)
            assert_same(by("triton", call, inputs), by("reference", call, inputs)) if not expected else by("triton", call, inputs)
            assert launched == expected
    finally:
        for module, name in ((forward, "modulate_tokens"), (backward, "backward_chunks"), (sums, "sum_chunks")):
            setattr(module, name, getattr(module, name).kernel)


def test_a_gradient_that_nobody_needs_is_empty(process):
    process.submit(only_what_is_needed).result()


def only_what_is_needed():
    """One at a time, and of two with the table; missing upstream gradients count as 0."""
    inputs, _ = run(dims=(3, 5, 12), affine=True, post_norm="rms", dtypes=(BF16, F32, F32))
    views = [inputs.get(n) for n in VECTORS]
    affine = [inputs["weight"], inputs["bias"], inputs["post_weight"]]
    fixed = (*views, *affine, random(3, 12, seed=3), None, "tanh", "rms")
    overloads = torch.ops.mmgen_kernels.gate_residual_adaln
    out = overloads.reference(inputs["x"], inputs["y"], *fixed, 1e-6, "layer", 1e-6, BF16)
    upstream = random(3, 5, 12, seed=7, dtype=BF16)
    for needed in ({0}, {1}, {2, 10}, {3}, {7, 4}, {9}, {10}):
        for grads in ((upstream, None, None), (None, upstream, None)):
            given = (*grads, inputs["y"], out[0], out[3], out[4], *fixed, "layer", *(i in needed for i in range(11)))
            backward = torch.ops.mmgen_kernels.gate_residual_adaln_backward
            for ours, plain in zip(backward.triton(*given), backward.reference(*given), strict=True):
                assert ours.shape == plain.shape and ours.dtype == plain.dtype
                assert torch.allclose(ours.double(), plain.double(), rtol=1e-2, atol=1e-5)


def test_nan_stays_in_its_token(process):
    process.submit(nan_stays).result()


def nan_stays():
    for value in (float("nan"), float("inf")):
        inputs, _ = run(dims=(3, 5, 12))
        inputs["x"][1, 2, 3] = value
        with mk.use_backend("triton"):
            residual, modulated = ops.gate_residual_adaln(*(inputs[n] for n in ("x", "y", "gate", "shift", "scale")))
        there = torch.zeros(3, 5, dtype=torch.bool)
        there[1, 2] = True
        assert torch.equal(modulated.isnan().all(-1), there) and torch.equal(modulated.isnan().any(-1), there)
        assert (~residual.isfinite()).sum() == 1


def test_opcheck(process):
    process.submit(check_operators).result()


def check_operators():
    inputs, _ = run(dims=(3, 4, 5))
    x, y, gate, shift, scale = (inputs[n].requires_grad_() for n in ("x", "y", *VECTORS[:3]))
    none = [None] * 4
    of = torch.ops.mmgen_kernels
    torch.library.opcheck(of.adaln.triton, (x, shift, scale, *none[:2], *none, "layer", 1e-6, F32))
    torch.library.opcheck(of.gate_residual.triton, (x, y, gate, *none[:3], "tanh", "rms", 1e-6))


# -- how rows and tokens are cut --------------------------------------------------------------------------------------


def test_tiles_cover_a_row_without_waste():
    from mmgen_kernels.modulation.triton_kernels import tiles

    for D in (*range(1, 700), *SIZES, 9000, 65537):
        for widest in (2048, 4096):
            cut = tiles.tiles_of(D, widest)
            assert [start for start, _ in cut] == [sum(w for _, w in cut[:i]) for i in range(len(cut))]
            assert all(width & (width - 1) == 0 and width <= widest for _, width in cut)
            assert tiles.lanes_of(cut) >= D > cut[-1][0]
            assert tiles.lanes_of(cut) - D <= max(D // 8, tiles.NARROWEST // 2), D
    idle = {D: tiles.lanes_of(tiles.tiles_of(D, 4096)) - D for D in SIZES}
    assert {D: lanes for D, lanes in idle.items() if lanes} == {1408: 128, 1920: 128, 2240: 64, 2432: 128, 3840: 256}


def test_chunks_keep_to_their_segment():
    from mmgen_kernels.modulation.triton_kernels import sums

    for T in (1, 31, 32, 33, 255, 256, 257, 1560, 5000):
        sample, shared, token = torch.empty(3, 1), torch.empty(1), torch.empty(3, T, 1)
        for vectors, segment in (((sample,), T), ((shared,), 3 * T), ((sample, token), T)):
            for step in (1, 4, 32):
                chunks = sums.chunks_of(vectors, None, 3, T, step)
                expected = segment if segment > 1 else 3 * T
                assert chunks.segment == expected and chunks.length % step == 0
                assert (chunks.pieces - 1) * chunks.length < expected <= chunks.pieces * chunks.length
                assert chunks.number == 3 * T // expected * chunks.pieces
        one = sums.chunks_of((torch.empty(1, 1),), None, 1, T, 1)
        many = sums.chunks_of((torch.empty(64, 1),), None, 64, T, 1)
        if T > 1:
            assert (one.pieces, one.length) == (many.pieces, many.length)
    assert sums.chunks_of((torch.empty(2, 6, 1), torch.empty(2, 4, 1)), None, 2, 24, 1).segment == 2


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_chunks_by_row(dtype):
    from mmgen_kernels.modulation.triton_kernels import sums

    generator = torch.Generator().manual_seed(1)
    for N, R in ((1, 1), (33, 1), (500, 7), (40, 300), (200, 4096)):
        rows = torch.randint(-3, R + 3, (N,), generator=generator, dtype=dtype)
        chunks = sums.chunks_by_row(rows, R)
        tokens, used = [], int(chunks.first[R])
        for c, (begin, end) in enumerate(zip(chunks.begins.tolist(), chunks.ends.tolist(), strict=True)):
            assert (begin < end <= begin + chunks.length) == (c < used)
            of_chunk = chunks.order[begin : max(begin, end)]
            assert len(set(rows[of_chunk].clamp(0, R - 1).tolist())) == int(c < used)
            tokens += of_chunk.tolist()
        expected = sorted(range(N), key=lambda i: min(max(int(rows[i]), 0), R - 1))
        assert tokens == expected


def test_no_look_at_a_value():
    """Fake tensors have none: a launcher that asked for one would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmgen_kernels.modulation import triton_kernels
    from mmgen_kernels.modulation.triton_kernels import backward, forward, sums

    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    patch = pytest.MonkeyPatch()
    patch.setattr(forward, "modulate_tokens", Silent())
    patch.setattr(backward, "backward_chunks", Silent())
    patch.setattr(sums, "sum_chunks", Silent())
    with patch.context(), FakeTensorMode():
        x, vector, rows = torch.empty(3, 6, 8), torch.empty(5, 8), torch.empty(3, 6, dtype=torch.int32)
        shared = (vector, vector, vector, None, None, None, None, None, torch.empty(3, 8), rows, "tanh", "rms")
        out = triton_kernels.gate_residual_adaln(x, x, *shared, 1e-6, "layer", 1e-6, F32)
        grads = triton_kernels.gate_residual_adaln_backward(x, x, None, x, out[0], out[3], out[4], *shared, "layer", *[True] * 11)
        assert [tuple(g.shape) for g in grads[2:5]] == [(5, 8)] * 3
    patch.undo()


def test_nothing_is_specialised_on_counts_of_tokens():
    from mmgen_kernels.modulation.triton_kernels import backward, forward, sums

    for kernel in (forward.modulate_tokens, backward.backward_chunks, sums.sum_chunks):
        integers = {p.name for p in kernel.params if p.do_not_specialize}
        counts = r"N|T|segment|pieces|length|chunks|last_row|\w+_(span|count|parts)"
        counted = {p.name for p in kernel.params if re.fullmatch(counts, p.name)}
        assert counted and integers == counted


def test_the_reference_takes_what_the_launchers_take():
    """Signatures: the schema's order is the reference's."""
    import inspect

    from mmgen_kernels.modulation import triton_kernels

    for name in triton_kernels.__all__:
        ours, plain = (inspect.signature(getattr(m, name)).parameters for m in (triton_kernels, reference))
        assert list(ours) == list(plain), name
