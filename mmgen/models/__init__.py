from mmgen.models.quantizers import FusedQuantizer, StockQuantizer
from mmgen.models.vqvae import VQVAE, VQVAEConfig

__all__ = ["VQVAE", "FusedQuantizer", "StockQuantizer", "VQVAEConfig"]
