"""What the interpreter cannot show of the Triton forward: copy engine, matrix units, specialised warps and CUDA graphs."""

import pytest
import torch
from attention_runs import BF16, F16, F64, random

import mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.battery import tolerance

pytestmark = pytest.mark.gpu


def projections(B, T, S, H, G, D, dtype=BF16):
    q = random(B, T, 3, H, D, seed=1, dtype=dtype).cuda()[:, :, 1]
    return q, *random(B, S, 2, G, D, seed=2, dtype=dtype).cuda().unbind(2)


def by(way, monkeypatch, *given, **options):
    monkeypatch.setattr(backends, "triton_attention", way)
    with mk.use_backend("triton"):
        return mk.attention(*given, return_lse=True, **options)


@pytest.mark.parametrize("way", ("descriptors", "warp_specialized"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dims", ((3, 257, 257, 4, 4, 72), (2, 130, 1000, 4, 2, 64), (1, 65, 200, 2, 1, 128), (1, 1, 63, 1, 1, 24)))
def test_same_bits_as_by_addresses(monkeypatch, dims, causal, way):
    given = projections(*dims)
    expected = by("pointers", monkeypatch, *given, causal=causal)
    for _ in range(3):
        assert all(map(torch.equal, by(way, monkeypatch, *given, causal=causal), expected))


def test_what_lies_beyond_a_sequence_leaves_no_trace(monkeypatch):
    q, k, v = projections(3, 65, 257, 2, 2, 72)
    lengths = torch.tensor([200, 0, 64], device="cuda")
    clean = by("pointers", monkeypatch, q, k, v, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    for way in backends.TRITON_ATTENTIONS:
        assert all(map(torch.equal, by(way, monkeypatch, q, k, v, key_lengths=lengths), clean))


def test_against_fp64(monkeypatch):
    given = projections(2, 65, 130, 2, 2, 72, F16)
    with mk.use_backend("reference"):
        plainly, truth = (mk.attention(*(t.to(dtype) for t in given), return_lse=True) for dtype in (F16, F64))
    for name, *results in zip(("out", "lse"), by("descriptors", monkeypatch, *given), plainly, truth, strict=True):
        _, failure = tolerance.failure(name, *(t.cpu() for t in results))
        assert failure is None, failure


def test_in_a_cuda_graph(monkeypatch):
    """Descriptors are arguments: a replay reads what the tensors hold then."""
    given = projections(2, 257, 257, 4, 4, 72)
    by("descriptors", monkeypatch, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = by("descriptors", monkeypatch, *given)
    for tensor in given:
        tensor.mul_(0.5)
    expected, _ = by("descriptors", monkeypatch, *given)
    graph.replay()
    assert torch.equal(out, expected)
