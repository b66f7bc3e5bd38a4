"""One pytest-benchmark per public op of the attention family: `make bench-micro`."""

import pytest
import torch

mk = pytest.importorskip("mmgen_kernels")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def projection(request):
    """q, k and v side by side, as one Linear gives them: DiT-S/2 with 4 samples."""
    return torch.randn(4, 256, 3, 6, 64, dtype=request.param)


def test_attention(benchmark, projection):
    benchmark(mk.attention, *projection.unbind(2))


def test_attention_forward_and_backward(benchmark, projection):
    leaves = [t.requires_grad_() for t in projection.unbind(2)]

    def step():
        out = mk.attention(*leaves)
        return torch.autograd.grad(out, leaves, out.detach())

    benchmark(step)


def test_joint_attention(benchmark, projection):
    text = torch.randn(4, 77, 3, 6, 64, dtype=projection.dtype)
    streams = list(zip(text.unbind(2), projection.unbind(2), strict=True))
    benchmark(mk.joint_attention, *streams)


def test_joint_attention_forward_and_backward(benchmark, projection):
    leaves = [torch.randn(4, 77, 3, 6, 64, dtype=projection.dtype).requires_grad_(), projection.requires_grad_()]

    def step():
        outs = mk.joint_attention(*zip(*(p.unbind(2) for p in leaves), strict=True))
        return torch.autograd.grad(outs, leaves, [o.detach() for o in outs])

    benchmark(step)


def test_qk_norm_rope(benchmark, projection):
    q, k, _ = projection.unbind(2)
    cos, sin = mk.rope_table(torch.arange(256)[:, None], (64,))
    benchmark(mk.qk_norm_rope, q, k, cos=cos, sin=sin, interleaved=True)


def test_qk_norm_rope_forward_and_backward(benchmark, projection):
    leaves = [*(t.detach().requires_grad_() for t in projection.unbind(2)[:2]), torch.ones(64, requires_grad=True)]
    cos, sin = mk.rope_table(torch.arange(256)[:, None], (64,))

    def step():
        out = mk.qk_norm_rope(*leaves[:2], q_weight=leaves[2], cos=cos, sin=sin, interleaved=True)
        return torch.autograd.grad(out, leaves, [o.detach() for o in out])

    benchmark(step)
