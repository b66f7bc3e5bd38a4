"""The launchers of the Triton kernels without a run: how rows and tokens are cut, and what they may not look at."""

import importlib.util
import inspect
import re

import pytest
import torch

from mmgen_kernels.modulation import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SIZES = (384, 768, 1024, 1152, 1408, 1536, 1920, 2048, 2240, 2304, 2432, 3072, 3840, 5120, 6144)


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
        out = triton_kernels.gate_residual_adaln(x, x, *shared, 1e-6, "layer", 1e-6, torch.float32)
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
    from mmgen_kernels.modulation import triton_kernels

    for name in triton_kernels.__all__:
        ours, plain = (inspect.signature(getattr(m, name)).parameters for m in (triton_kernels, reference))
        assert list(ours) == list(plain), name
