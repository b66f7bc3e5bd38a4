from mmgen.models.dit import DiT, DiT_models, DiTConfig
from mmgen.models.quantizers import FusedQuantizer, StockQuantizer
from mmgen.models.vqvae import VQVAE, VQVAEConfig

__all__ = ["VQVAE", "DiT", "DiTConfig", "DiT_models", "FusedQuantizer", "StockQuantizer", "VQVAEConfig"]
