from mmgen.models.code_diffusion import CodeDiffusion, CodeDiffusionConfig
from mmgen.models.code_transformer import CodeTransformer, CodeTransformerConfig
from mmgen.models.dit import DiT, DiT_models, DiTConfig
from mmgen.models.quantizers import FusedQuantizer, StockQuantizer
from mmgen.models.vqvae import VQVAE, VQVAEConfig

__all__ = [
    "VQVAE",
    "CodeDiffusion",
    "CodeDiffusionConfig",
    "CodeTransformer",
    "CodeTransformerConfig",
    "DiT",
    "DiTConfig",
    "DiT_models",
    "FusedQuantizer",
    "StockQuantizer",
    "VQVAEConfig",
]
