import pytest
import torch

from mmgen.models import VQVAE, VQVAEConfig


def build(**options) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(**({"channels": (8, 16), "codebook_size": 32} | options)))


@pytest.mark.parametrize(
    ("options", "size", "tokens"),
    [
        ({}, (16, 16), (4, 4)),
        ({}, (24, 40), (6, 10)),
        ({"in_channels": 1, "patch_size": 1, "channels": (8,)}, (5, 7), (5, 7)),
        ({"patch_size": 4, "channels": (8, 8, 16), "num_res_blocks": 2}, (32, 16), (2, 1)),
    ],
)
def test_shapes(options, size, tokens):
    model = build(**options)
    image = torch.rand(2, model.config.in_channels, *size) * 2 - 1
    out = model(image)
    assert out.image.shape == image.shape
    assert out.indices.shape == (2, *tokens)
    assert out.latents.shape == (2, model.config.codebook_dim, *tokens)
    assert out.vq_loss.shape == ()
    assert model.config.downsampling == size[0] // tokens[0]


def test_encode_and_decode_are_the_two_halves_of_forward():
    model = build()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    whole, encoded = model(image), model.encode(image)
    assert torch.equal(whole.indices, encoded.indices)
    assert torch.equal(whole.image, model.decode(encoded.quantized))
    torch.testing.assert_close(whole.image, model.decode_code(encoded.indices))


def test_every_parameter_learns():
    model = build(codebook_size=4)
    for block in model.modules():  # past the zeros that each block starts with, which hide what is before them
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    image = torch.rand(4, 3, 16, 16) * 2 - 1
    out = model(image)
    ((out.image - image).square().mean() + out.vq_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_state_dict_has_the_names_of_the_field():
    names = set(build().state_dict())
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"}
    assert "quantize.embedding.weight" in names
    assert build(quantizer="stock").state_dict().keys() == names


def test_both_quantizers_start_from_the_same_bits():
    stock, fused = build(quantizer="stock").state_dict(), build(quantizer="fused").state_dict()
    assert all(torch.equal(stock[name], fused[name]) for name in stock)


def test_losses_and_gradients_agree_for_some_steps():
    models = [build(quantizer=quantizer, codebook_size=256) for quantizer in ("stock", "fused")]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    for step in range(5):
        image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            out = model(image)
            loss = (out.image - image).square().mean() + out.vq_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        stock, fused = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in models)
        assert (fused - stock).norm() < 1e-4 * stock.norm(), f"step {step}"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 18), r"image must have height and width divisible by 4, got \(16, 18\)"),
        ((1, 1, 16, 16), r"image must be \(B, 3, H, W\), got \(1, 1, 16, 16\)"),
        ((3, 16, 16), r"image must be \(B, 3, H, W\), got \(3, 16, 16\)"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "fast"}, "quantizer must be one of stock, fused, got 'fast'"),
        ({"channels": (12,)}, r"channels must be positive multiples of 8, got \(12,\)"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**options)
