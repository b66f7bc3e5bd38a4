import pytest
import torch

from mmgen.models import FusedQuantizer, StockQuantizer

K, D = 64, 4


def build(kind, l2_normalize=True):
    torch.manual_seed(0)
    return kind(K, D, l2_normalize=l2_normalize, beta=0.25)


def step(quantizer, z):
    z = z.clone().requires_grad_()
    out = quantizer(z)
    weight = torch.linspace(-1, 1, out.quantized.numel()).view_as(out.quantized)
    ((out.quantized * weight).sum() + 3 * out.loss).backward()
    return out, z.grad, quantizer.embedding.weight.grad


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_stock_and_fused_are_interchangeable(l2_normalize):
    stock, fused = build(StockQuantizer, l2_normalize), build(FusedQuantizer, l2_normalize)
    assert torch.equal(stock.embedding.weight, fused.embedding.weight)
    assert stock.state_dict().keys() == fused.state_dict().keys()
    z = torch.randn(2, D, 3, 5)
    (a, a_dz, a_de), (b, b_dz, b_de) = step(stock, z), step(fused, z)
    assert a.quantized.shape == b.quantized.shape == z.shape
    assert torch.equal(a.indices, b.indices)
    torch.testing.assert_close(a.quantized, b.quantized)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a_dz, b_dz)
    torch.testing.assert_close(a_de, b_de)


@pytest.mark.parametrize("kind", [StockQuantizer, FusedQuantizer])
@pytest.mark.parametrize("l2_normalize", [True, False])
def test_quantized_are_the_codes_of_the_indices(kind, l2_normalize):
    quantizer = build(kind, l2_normalize)
    out = quantizer(torch.randn(2, D, 3, 5))
    torch.testing.assert_close(out.quantized, quantizer.codes(out.indices))
    assert out.indices.shape == (2, 3, 5)


@pytest.mark.parametrize("kind", [StockQuantizer, FusedQuantizer])
def test_losses_follow_the_formula(kind):
    quantizer = build(kind, l2_normalize=False)
    z = torch.randn(2, D, 3, 5)
    out = quantizer(z)
    distance = (z - quantizer.codes(out.indices)).square().mean()
    torch.testing.assert_close(out.loss, 1.25 * distance)
    _, dz, _ = step(quantizer, z)
    straight_through = torch.linspace(-1, 1, z.numel()).view_as(z)
    commitment = 3 * 0.25 * 2 * (z - quantizer.codes(out.indices)) / z.numel()
    torch.testing.assert_close(dz, straight_through + commitment)


def test_l2_normalize_leaves_only_directions():
    quantizer = build(FusedQuantizer)
    z = torch.randn(2, D, 3, 5)
    near, far = quantizer(z), quantizer(100 * z)
    assert torch.equal(near.indices, far.indices)
    torch.testing.assert_close(near.quantized.norm(dim=1), torch.ones(2, 3, 5))
    plain = build(FusedQuantizer, l2_normalize=False)
    assert not torch.equal(plain(z).indices, plain(0.01 * z).indices)


def test_revived_codes_are_the_unused_ones_on_their_turn_and_each_latent_serves_once():
    quantizer = build(StockQuantizer, l2_normalize=False)
    counts = torch.arange(K) % 2  # every second code is unused
    z = torch.randn(1, D, 5, 4)  # 20 latents, so 64 codes take four turns
    rows = z.permute(0, 2, 3, 1).reshape(20, D)
    for turn in range(5):
        before = quantizer.embedding.weight.detach().clone()
        quantizer.revive_(z, counts, turn)
        after = quantizer.embedding.weight.detach()
        on_turn = [k for k in range(K) if k % 2 == 0 and k // 20 == turn % 4]
        assert torch.equal(after[on_turn], rows[[k % 20 for k in on_turn]])
        others = [k for k in range(K) if k not in on_turn]
        assert torch.equal(after[others], before[others])
