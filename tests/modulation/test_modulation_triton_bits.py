"""What the Triton kernels promise of bits, by the interpreter: again, in other batches, as two halves, and from views."""

import importlib.util

import pytest
import torch
from modulation_runs import BF16, F32, OPTIONS, random, run, vectors_of

import mmgen_kernels as mk
from mmgen_kernels.modulation import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


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
