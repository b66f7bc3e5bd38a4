"""The launchers of the Triton kernels without a run: tiles, signatures, and what they may not look at."""

import importlib.util
import inspect
import itertools

import pytest
import torch

from mmgen_kernels.attn import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def test_tiles_cover_a_head_without_waste():
    from mmgen_kernels.attn.triton_kernels.tiles import tiles_of

    for D in range(8, 257, 8):
        for narrowest in (8, 16):
            cut = tiles_of(D, narrowest)
            assert [start for start, _ in cut] == [sum(w for _, w in cut[:i]) for i in range(len(cut))]
            assert all(width & (width - 1) == 0 and width >= narrowest for _, width in cut)
            columns = sum(width for _, width in cut)
            assert columns >= D > cut[-1][0]
            assert columns - -(-D // narrowest) * narrowest <= D / 12
    assert tiles_of(72, 16) == ((0, 64), (64, 16)) and tiles_of(72, 8) == ((0, 64), (64, 8))
    assert tiles_of(80, 16) == tiles_of(80, 8) == ((0, 64), (64, 16)) and tiles_of(96, 8) == ((0, 64), (64, 32))


def kernels():
    from mmgen_kernels.attn.triton_kernels import backward_bias, backward_keys, backward_queries, backward_short, forward

    modules = (forward, backward_queries, backward_keys, backward_short, backward_bias)
    return [getattr(m, n) for m in modules for n in vars(m) if n.startswith("attention_") and hasattr(getattr(m, n), "params")]


def test_nothing_is_specialised_on_sizes():
    assert len(kernels()) == 5
    for kernel in kernels():
        integers = {p.name for p in kernel.params if p.do_not_specialize}
        sizes = {"T", "S", "H", "group", "C", "tiles", "tiles_m", "tiles_n", "heads", "b_walk", "h_walk"}
        strides = {f"{of}_{d}" for of in ("q", "k", "v", "out", "grad", "new", "bias") for d in "bth"}
        assert integers == {p.name for p in kernel.params if p.name in sizes | strides}


def test_two_ways_have_the_same_tiles():
    """The bits of short heads: tiles of keys are those that queries walk, tiles of queries those that keys walk."""
    from mmgen_kernels.attn.triton_kernels import configuration

    for dtype, D, capability in itertools.product((BF16, F16, F32), range(8, 257, 8), ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))):
        short = configuration.short_configuration(dtype, D, capability)
        if short is not None:
            assert short.block_n == configuration.queries_configuration(dtype, D, capability).block_n
            assert short.block_m == configuration.keys_configuration(dtype, D, capability).block_m


def test_no_look_at_a_value():
    """Fake tensors have none: a launcher that asked for one would fail. And one axis of programs, so that many heads fit."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmgen_kernels.attn import triton_kernels
    from mmgen_kernels.attn.triton_kernels import backward, forward

    grids = []

    class Silent:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    patch = pytest.MonkeyPatch()
    for module in (forward, backward):
        for name in [n for n in vars(module) if n.startswith("attention_") and n != "attention_backward"]:
            patch.setattr(module, name, Silent())
    patch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)  # an address is no value
    with patch.context(), FakeTensorMode():
        q, k = torch.empty(1, 50, 4, 8, dtype=BF16), torch.empty(1, 60, 2, 8, dtype=BF16)
        bounds, lengths = torch.empty(7, dtype=torch.int32), torch.empty(70000, dtype=torch.int64)
        many_q, many_k, bias = q.expand(70000, 50, 4, 8), k.expand(70000, 60, 2, 8), torch.empty(1, 4, 50, 60)
        for given in ((q, k, k, None, None, bounds, bounds), (many_q, many_k, many_k, bias, lengths, None, None)):
            out, lse = triton_kernels.attention(*given, False, 1.0, True)
            grads = triton_kernels.attention_backward(out, lse, *given, out, lse, False, 1.0, True, *[True] * 4)
            assert [g.shape for g in grads[:3]] == [t.shape for t in given[:3]]
    patch.undo()
    assert len(grids) == 6 and all(len(grid) == 1 for grid in grids)
    assert grids[0] == (4 * (50 // 64 + 8),) and grids[3] == (70000 * 4,)


def test_the_reference_takes_what_the_launchers_take():
    """Signatures: the schema's order is the reference's. Who needs what may be spelled out or taken as it comes."""
    from mmgen_kernels.attn import triton_kernels

    for name in triton_kernels.__all__:
        ours, plainly = (inspect.signature(getattr(m, name)).parameters for m in (triton_kernels, reference))
        assert [n for n in ours if n[:4] != "need"] == [n for n in plainly if n[:4] != "need"], name
