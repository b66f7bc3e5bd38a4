"""A convolutional autoencoder with Gaussian latents (Kingma and Welling 2013), as latent diffusion has it (Rombach et al. 2022).

Names in the state dict are the field's (latent-diffusion, diffusers): `encoder`, `decoder`, `quant_conv`, `post_quant_conv`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # exp of either, and its square, are finite in fp32


@dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
    latent_channels: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels must be at least 1, got {self.latent_channels}")


class DiagonalGaussian:
    """Independent normals with mean and log of the variance out of moments (B, 2 D, h, w), the latter clamped to [-30, 20]."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, D, h, w)
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def sample(self, key: Tensor) -> Tensor:
        """``mean + std z``, (B, D, h, w), with the noise z of a key (2,) or of one key per sample (B, 2)."""
        noise = mk.philox_normal(tuple(self.mean.shape), key).to(self.mean)
        return self.mean + (self.logvar / 2).exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal of each sample, ``sum(mean^2 + var - 1 - logvar) / 2``, (B,)."""
        return (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(dim=1) / 2


class KLReconstruction(NamedTuple):
    """What an `AutoencoderKL` returns."""

    image: Tensor  # (B, C, H, W)
    posterior: DiagonalGaussian
    latents: Tensor  # (B, D, h, w), what was decoded


class AutoencoderKL(Autoencoder):
    """Images to latents of about unit variance and back.

    `latent_variance` is a buffer that training keeps: the variance of its latents, over which those for a diffusion model are
    normalised.
    """

    config: AutoencoderKLConfig
    latent_variance: Tensor

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.channels[-1], 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.channels[-1], 1)
        self.decoder = Decoder(config)
        self.register_buffer("latent_variance", torch.ones(()))

    @property
    def scaling_factor(self) -> Tensor:
        """What makes latents those of a diffusion model by multiplication, ()."""
        return self.latent_variance.rsqrt()

    def encode(self, image: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.moments(image))

    def latents(self, image: Tensor, key: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> scaled latents (B, D, h, w) for a diffusion model; the mode without a key."""
        posterior = self.encode(image)
        return self.scaling_factor * (posterior.mode() if key is None else posterior.sample(key))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, D, h, w) -> images (B, C, H, W)."""
        return self.decode(latents / self.scaling_factor)

    def forward(self, image: Tensor, key: Tensor | None = None) -> KLReconstruction:
        """Decodes the mode, or with a key a sample."""
        posterior = self.encode(image)
        z = posterior.mode() if key is None else posterior.sample(key)
        return KLReconstruction(self.decode(z), posterior, z)
