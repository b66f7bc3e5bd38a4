"""A Diffusion Transformer over a tokenizer's codes, some of which are hidden: it says of each place which code belongs there.

The blocks are DiT's, conditioned on the time, with rows and columns in the attention; how codes are hidden, what is learnt from it
and how pictures are drawn is `mmgen.diffusion.codes`.
"""

from dataclasses import dataclass

from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen.models.code_transformer import CodeEmbedding, CodeTransformerConfig
from mmgen.models.dit import TimestepEmbedder


@dataclass(frozen=True)
class CodeDiffusionConfig(CodeTransformerConfig):
    cond_dim: int = 16  # of the time: one number needs few, and each costs 6 * hidden_size weights in every block

    def __post_init__(self):
        super().__post_init__()
        if self.cond_dim < 1:
            raise ValueError(f"cond_dim must be at least 1, got {self.cond_dim}")


class CodeDiffusion(nn.Module):
    """Codes, hidden ones among them, and their times -> logits of the codes, at each place.

    Shape:
        codes (B, T), int64, row by row, `num_codes` where one is hidden; t (B,), 0 ... 1000 from all seen to all hidden. The result
        is (B, T, K), zeros before training.

    Raises:
        ValueError: codes have another shape.
    """

    def __init__(self, config: CodeDiffusionConfig):
        super().__init__()
        self.config = config
        self.embedding = CodeEmbedding(config)
        self.t_embedder = TimestepEmbedder(config.cond_dim)
        self.blocks = nn.ModuleList(
            mk.nn.DiTBlock(config.hidden_size, config.num_heads, config.mlp_ratio, qk_norm="rms", cond_dim=config.cond_dim)
            for _ in range(config.depth)
        )
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and "adaLN_modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("adaLN_modulation.1.bias"):
                parameter.data.view(6, -1)[[2, 5]] = 1.0  # gates start open: 7.80 bits after 40 steps, 8.39 with DiT's zeros
        self.final_layer = mk.nn.FinalLayer(config.hidden_size, 1, config.num_codes + config.code_dim, cond_dim=config.cond_dim)

    def forward(self, codes: Tensor, t: Tensor) -> Tensor:
        if codes.dim() != 2 or codes.shape[1] != self.config.num_tokens:
            raise ValueError(f"codes must be (B, {self.config.num_tokens}), got {tuple(codes.shape)}")
        x, c = self.embedding(codes), self.t_embedder(t)  # (B, T, D), (B, cond_dim)
        for block in self.blocks:
            x = block(x, c, cos=self.embedding.cos, sin=self.embedding.sin)
        return self.embedding.logits(self.final_layer(x, c))
