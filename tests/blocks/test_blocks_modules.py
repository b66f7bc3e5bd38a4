"""mk.nn.DiTBlock, mk.nn.FinalLayer and mk.update_ema."""

import copy

import pytest
import torch
from torch import nn

import mmgen_kernels as mk

B, T, D, H = 3, 10, 32, 2
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # products of other sizes add in another order; outputs are up to 20
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
KEYS = {f"{name}.{kind}" for name in LINEARS for kind in ("weight", "bias")}
RMS = {"norm": "rms", "elementwise_affine": True, "cond_dim": 20}


def drawn(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def test_state_dict_is_that_of_dit():
    block = mk.nn.DiTBlock(D, H)
    assert set(block.state_dict()) == KEYS
    assert block.state_dict()["adaLN_modulation.1.weight"].shape == (6 * D, D)
    assert set(mk.nn.FinalLayer(D, 2, 4).state_dict()) == {
        f"{name}.{kind}" for name in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")
    }
    affine = mk.nn.DiTBlock(D, H, norm="rms", elementwise_affine=True)
    assert set(affine.state_dict()) == KEYS | {"norm1.weight", "norm2.weight"}
    assert mk.nn.DiTBlock(D, H, activation="swiglu", mlp_ratio=2).mlp["fc1"].weight.shape == (4 * D, D)


def test_a_new_block_is_the_identity_and_learns():
    block = mk.nn.DiTBlock(D, H)
    x, c = torch.randn(B, T, D), torch.randn(B, D)
    assert torch.equal(block(x, c), x)
    assert not mk.nn.FinalLayer(D, 2, 4)(x, c).any()
    block(x, c).square().sum().backward()
    assert block.adaLN_modulation[1].weight.grad.any()  # the gates': the way in


@pytest.mark.parametrize("options", ({}, {"activation": "swiglu"}, RMS), ids=str)
def test_frames_rows_and_lengths(options):
    """A conditioning for frames is that of its tokens; rows say the same; what is padding is not seen."""
    block = drawn(mk.nn.DiTBlock(D, H, **options))
    x, c = torch.randn(B, T, D), torch.randn(B, 2, options.get("cond_dim", D))
    frames = block(x, c)
    rows = (torch.arange(B)[:, None] * 2 + torch.arange(T) // (T // 2)).int()
    torch.testing.assert_close(block(x, c.flatten(0, 1), rows=rows), frames, **CLOSE)
    lengths = torch.tensor([10, 4, 7])
    padded = block(x, c[:, 0], key_lengths=lengths)
    for sample, length in enumerate(lengths):
        alone = block(x[sample : sample + 1, :length], c[sample : sample + 1, 0])
        torch.testing.assert_close(padded[sample : sample + 1, :length], alone, **CLOSE)
    packed = block(x.flatten(0, 1)[None], c[:1, 0], cu_seqlens=torch.tensor([0, 10, 30]))
    torch.testing.assert_close(packed[:, :10], block(x[:1], c[:1, 0]), **CLOSE)


def test_qk_norm_and_rotary_embedding():
    block = drawn(mk.nn.DiTBlock(D, H, qk_norm="rms", interleaved=True))
    assert set(block.state_dict()) == KEYS | {"attn.q_norm.weight", "attn.k_norm.weight"}
    x, c = torch.randn(B, T, D), torch.randn(B, D)
    cos, sin = mk.rope_table(torch.arange(T)[:, None], (D // H,))
    turned = block(x, c, cos=cos, sin=sin)
    assert not torch.allclose(turned, block(x, c))
    later = block(x, c, **dict(zip(("cos", "sin"), mk.rope_table(torch.arange(5, 5 + T)[:, None], (D // H,)), strict=True)))
    torch.testing.assert_close(later, turned, rtol=1e-4, atol=1e-4)  # attention sees differences of positions alone


def test_final_layer():
    layer = drawn(mk.nn.FinalLayer(D, 2, 4))
    x, c = torch.randn(B, T, D), torch.randn(B, D)
    shift, scale = layer.adaLN_modulation(c)[:, None].chunk(2, -1)
    normed = nn.functional.layer_norm(x, (D,), eps=1e-6)
    torch.testing.assert_close(layer(x, c), layer.linear(normed * (1 + scale) + shift))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, c).dtype == torch.bfloat16


# -- update_ema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", (0.0, 0.9, 0.9999, 1.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_update_ema(decay, dtype):
    model = drawn(mk.nn.DiTBlock(D, H)).to(dtype)
    ema = drawn(copy.deepcopy(model))
    expected = {n: p * decay + dict(model.named_parameters())[n] * (1 - decay) for n, p in ema.named_parameters()}
    of_model = copy.deepcopy(model.state_dict())
    versions = [p._version for p in ema.parameters()]
    mk.update_ema(ema, model, decay)
    for name, parameter in ema.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert parameter.grad_fn is None and parameter.requires_grad
    assert all(p._version > v for p, v in zip(ema.parameters(), versions, strict=True))
    assert all(torch.equal(v, of_model[n]) for n, v in model.state_dict().items())
    if decay == 0:
        assert all(torch.equal(v, of_model[n]) for n, v in ema.state_dict().items())


def test_update_ema_rounds_once():
    """Equal parameters stay where they are: in fp32 ema * decay + parameter * (1 - decay) moves three in ten of them."""
    model = drawn(nn.Linear(100, 100))
    ema = copy.deepcopy(model)
    mk.update_ema(ema, model, 0.9999)
    assert torch.equal(ema.weight, model.weight)
    moved = model.weight * 0.9999 + model.weight * (1 - 0.9999) != model.weight
    assert moved.float().mean() > 0.1


def test_update_ema_of_wrapped_models_and_other_dtypes():
    model = drawn(mk.nn.DiTBlock(D, H))
    ema = copy.deepcopy(model).double().requires_grad_(False)
    before = copy.deepcopy(ema)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.compile(model)

    assert all(n.startswith("module._orig_mod.") for n, _ in Wrapped().named_parameters())
    drawn(model)
    mk.update_ema(ema, Wrapped(), decay=0.5)
    for mean, old, new in zip(ema.parameters(), before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mean, (old + new.double()) / 2)


def test_update_ema_leaves_buffers_alone():
    model, ema = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model.running_mean.fill_(7)
    mk.update_ema(ema, model)
    assert not ema.running_mean.any()
