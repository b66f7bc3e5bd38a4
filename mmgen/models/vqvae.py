"""A convolutional VQ-VAE: encoder, quantizer, decoder. Trained against a discriminator it is the tokenizer of a VQGAN.

Names in the state dict are the field's (taming-transformers, LlamaGen): `encoder`, `decoder`, `quant_conv`,
`post_quant_conv`, `quantize.embedding.weight`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from mmgen.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder
from mmgen.models.quantizers import QUANTIZERS, Quantized


@dataclass(frozen=True)
class VQVAEConfig(AutoencoderConfig):
    codebook_size: int = 16384  # K
    codebook_dim: int = 8  # D
    l2_normalize: bool = True  # latents and codes on the unit sphere
    beta: float = 0.25  # of the commitment loss beside the codebook loss
    quantizer: str = "fused"  # or "stock", the same in plain PyTorch

    def __post_init__(self):
        super().__post_init__()
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        for name in ("codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Reconstruction(NamedTuple):
    """What a `VQVAE` returns."""

    image: Tensor  # (B, C, H, W)
    vq_loss: Tensor  # ()
    indices: Tensor  # (B, h, w), int64; h = H / downsampling
    latents: Tensor  # (B, D, h, w), what the quantizer was given


class VQVAE(Autoencoder):
    """Images (B, C, H, W) in [-1, 1] to codes of a codebook (K, D) and back; the loss is that of van den Oord et al. 2017."""

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.channels[-1], config.codebook_dim, 1)
        self.quantize = QUANTIZERS[config.quantizer](
            config.codebook_size, config.codebook_dim, l2_normalize=config.l2_normalize, beta=config.beta
        )
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.channels[-1], 1)
        self.decoder = Decoder(config)

    def latents(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents before quantization, (B, D, h, w)."""
        return self.moments(image)

    def encode(self, image: Tensor) -> Quantized:
        return self.quantize(self.latents(image))

    def decode_code(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> images (B, C, H, W)."""
        return self.decode(self.quantize.codes(indices))

    def forward(self, image: Tensor) -> Reconstruction:
        z = self.latents(image)
        quantized, vq_loss, indices = self.quantize(z)
        return Reconstruction(self.decode(quantized), vq_loss, indices, z)
