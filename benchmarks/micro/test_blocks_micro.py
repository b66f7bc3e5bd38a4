"""One pytest-benchmark per public op of the blocks: `make bench-micro`."""

import copy

import pytest
import torch

mk = pytest.importorskip("mmgen_kernels")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
D, H, M = 384, 6, 1536  # DiT-S/2, one sample


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def draw(request):
    return lambda *shape: torch.randn(*shape).div(shape[-1] ** 0.5).to(request.param).requires_grad_()


def step(benchmark, function, *given, **options):
    def both():
        out = function(*given, **options)
        return torch.autograd.grad(out, given, out.detach())

    benchmark(both)


def tokens(draw):
    return draw(1, 256, D), *(draw(1, D) for _ in range(3))


def attention(draw):
    return draw(3 * D, D), draw(3 * D), draw(D, D), draw(D)


def mlp(draw):
    return draw(M, D), draw(M), draw(D, M), draw(D)


def test_adaln_attention(benchmark, draw):
    step(benchmark, mk.adaln_attention, *tokens(draw), *attention(draw), num_heads=H)


def test_adaln_mlp(benchmark, draw):
    step(benchmark, mk.adaln_mlp, *tokens(draw), *mlp(draw))


def test_dit_block(benchmark, draw):
    vectors = (draw(1, D) for _ in range(3))
    step(benchmark, mk.dit_block, *tokens(draw), *vectors, *attention(draw), *mlp(draw), num_heads=H)


def test_update_ema(benchmark):
    model = mk.nn.DiTBlock(D, H)
    benchmark(mk.update_ema, copy.deepcopy(model), model)
