from mmgen.models.autoencoder import Autoencoder, AutoencoderConfig
from mmgen.models.code_diffusion import CodeDiffusion, CodeDiffusionConfig
from mmgen.models.code_transformer import CodeTransformer, CodeTransformerConfig
from mmgen.models.dit import DiT, DiT_models, DiTConfig
from mmgen.models.quantizers import FusedQuantizer, StockQuantizer
from mmgen.models.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian
from mmgen.models.vqgan import DiscriminatorConfig, PatchDiscriminator
from mmgen.models.vqvae import VQVAE, VQVAEConfig

__all__ = [
    "VQVAE",
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CodeDiffusion",
    "CodeDiffusionConfig",
    "CodeTransformer",
    "CodeTransformerConfig",
    "DiT",
    "DiTConfig",
    "DiT_models",
    "DiagonalGaussian",
    "DiscriminatorConfig",
    "FusedQuantizer",
    "PatchDiscriminator",
    "StockQuantizer",
    "VQVAEConfig",
]
