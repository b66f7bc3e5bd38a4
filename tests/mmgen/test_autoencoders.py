"""The parts of VQGAN and of the KL autoencoder, against values by hand."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import mmgen_kernels as mk
from mmgen.data import load
from mmgen.diffusion import Objective, ObjectiveConfig, sample
from mmgen.models import (
    VQVAE,
    AutoencoderKL,
    AutoencoderKLConfig,
    DiagonalGaussian,
    DiscriminatorConfig,
    DiT,
    DiTConfig,
    PatchDiscriminator,
    VQVAEConfig,
)
from mmgen.models.autoencoder import AttentionBlock
from mmgen.models.vqgan import GradientPyramid, adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from mmgen.presets import photographs

KEY = torch.tensor([3, 0])


def small_vae(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(**({"channels": (8, 16), "latent_channels": 4} | options)))


def test_hinge_losses_of_known_scores():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((2.5 / 3 + 1.25 / 2) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx(2.75 / 2)


def test_the_adaptive_weight_of_known_gradients():
    three, five = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([3.0, 4.0])
    assert adaptive_weight(three, five).item() == pytest.approx(3 / 5)
    assert adaptive_weight(three, torch.zeros(2)).item() == 1e4
    assert adaptive_weight(torch.zeros(2), five).item() == 0
    assert adaptive_weight(three, torch.zeros(2), eps=0.5).item() == pytest.approx(6)


def test_the_pyramid_of_a_known_image():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)  # rises by one from column to column, by two at half the size, by four after that
    flat = torch.full((1, 1, 8, 8), 5.0)
    assert GradientPyramid(scales=1)(ramp, flat).item() == pytest.approx(1)
    assert GradientPyramid(scales=3)(ramp, flat).item() == pytest.approx(1 + 2 + 4)
    assert GradientPyramid()(ramp + 0.5, ramp).item() == 0


@pytest.mark.parametrize(("num_layers", "patch", "grid"), [(1, 16, 30), (2, 34, 14), (3, 70, 6)])
def test_a_score_sees_a_patch(num_layers, patch, grid):
    """Of an image without norms, whose statistics see all of it."""
    torch.manual_seed(0)
    judge = PatchDiscriminator(DiscriminatorConfig(channels=8, num_layers=num_layers))
    for i, module in enumerate(judge.main):
        if isinstance(module, torch.nn.GroupNorm):
            judge.main[i] = torch.nn.Identity()
    side = max(64, 2 * patch)
    image = torch.randn(1, 3, side, side, requires_grad=True)
    scores = judge(image)
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle].backward()
    seen = image.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [patch, patch]
    assert judge(torch.zeros(2, 3, 64, 64)).shape == (2, 1, grid, grid)


def test_a_score_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    judge = PatchDiscriminator(DiscriminatorConfig(channels=8))
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(judge(images)[1:2], judge(images[1:2]))


def test_the_divergence_is_that_of_torch_distributions():
    torch.manual_seed(0)
    moments = torch.randn(5, 6, 2, 4, dtype=torch.float64)
    posterior = DiagonalGaussian(moments)
    mean, logvar = moments.chunk(2, dim=1)
    normal = Independent(Normal(mean, (logvar / 2).exp()), 3)
    standard = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    torch.testing.assert_close(posterior.kl(), kl_divergence(normal, standard))
    assert torch.equal(posterior.mode(), mean)


def test_a_variance_is_kept_finite():
    posterior = DiagonalGaussian(torch.tensor([1.0, 1.0, 1e4, -1e4]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0]
    assert posterior.kl().isfinite().all() and posterior.sample(KEY).isfinite().all()


def test_samples_have_the_mean_and_the_variance_and_are_a_function_of_the_key():
    moments = torch.cat([torch.full((1, 1, 100, 100), 3.0), torch.full((1, 1, 100, 100), 2 * math.log(0.5))], dim=1)
    posterior = DiagonalGaussian(moments)
    drawn = posterior.sample(KEY)
    assert drawn.mean().item() == pytest.approx(3, abs=4 * 0.5 / 100)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(drawn, posterior.sample(KEY))
    assert not torch.equal(drawn, posterior.sample(mk.fold_in(KEY, 1)))


def test_the_names_are_those_of_the_field():
    names = {name.split(".")[0] for name in small_vae().state_dict()}
    assert names == {"encoder", "decoder", "quant_conv", "post_quant_conv", "latent_variance"}


def test_shapes_of_the_kl_autoencoder():
    model, image = small_vae(), torch.rand(2, 3, 16, 24) * 2 - 1
    out = model(image)
    assert out.image.shape == image.shape
    assert out.latents.shape == out.posterior.mean.shape == (2, 4, 4, 6)
    assert torch.equal(out.latents, out.posterior.mean)
    drawn = model(image, KEY)
    assert torch.equal(drawn.latents, drawn.posterior.sample(KEY)) and not torch.equal(drawn.latents, out.latents)
    with pytest.raises(ValueError, match=r"image must be \(B, 3, H, W\), got \(2, 1, 16, 16\)"):
        model(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="latent_channels must be at least 1, got 0"):
        AutoencoderKLConfig(latent_channels=0)


def test_scaled_latents_and_the_way_back():
    model, image = small_vae(), torch.rand(2, 3, 16, 16) * 2 - 1
    model.latent_variance.fill_(0.25)
    torch.testing.assert_close(model.latents(image), 2 * model.encode(image).mode())
    torch.testing.assert_close(model.decode_latents(model.latents(image)), model(image).image)


def test_attention_starts_as_the_identity_and_then_mixes_all_places():
    torch.manual_seed(0)
    block, x = AttentionBlock(16), torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(block(x), x)
    torch.nn.init.normal_(block.proj_out.weight)
    y = x.clone()
    y[0, :, 0, 0] += 1
    changed = (block(y) - block(x)).abs().amax(dim=1) > 1e-6  # (B, H, W)
    assert changed[0].all() and not changed[1].any()
    q, k, v = (part(block.norm(x)).flatten(2) for part in (block.q, block.k, block.v))  # (B, C, H W)
    attended = v @ ((q.transpose(1, 2) @ k) / 4).softmax(dim=-1).transpose(1, 2)
    torch.testing.assert_close(block(x), x + block.proj_out(attended.view_as(x)), atol=1e-5, rtol=1e-5)


def test_attention_is_an_option_of_any_autoencoder():
    image = torch.rand(1, 3, 16, 16)
    for kind, config in ((VQVAE, VQVAEConfig), (AutoencoderKL, AutoencoderKLConfig)):
        with_it, without = (kind(config(channels=(8, 16), attention=attention)) for attention in (True, False))
        assert len([m for m in with_it.modules() if isinstance(m, AttentionBlock)]) == 2
        assert not [m for m in without.modules() if isinstance(m, AttentionBlock)]
        assert with_it(image).image.shape == image.shape


def test_a_diffusion_transformer_learns_latents_and_its_samples_are_decoded():
    """From photographs to pictures: crops, latents, the loss with a gradient, samples, images."""
    crops = load(photographs().data, seed=0).held_out
    model = small_vae(channels=(8, 16, 16)).eval()
    images = torch.stack([crops[i] for i in range(2)])
    with torch.no_grad():
        model.latent_variance.copy_(model.encode(images).mode().var())
        latents = model.latents(images)  # (2, 4, 8, 8)
    assert latents.var().item() == pytest.approx(1, rel=1e-4)
    dit = DiT(DiTConfig(input_size=8, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=2, learn_sigma=False))
    objective = Objective(ObjectiveConfig(), torch.device("cpu"))
    objective.loss(dit, latents, torch.tensor([0, 1]), KEY).backward()
    assert dit.final_layer.linear.weight.grad.abs().max() > 0
    drawn = sample(dit.eval(), torch.tensor([0, 1]), objective.config.scheduler, 2, key=KEY)
    assert drawn.shape == latents.shape
    assert model.decode_latents(drawn).shape == images.shape
