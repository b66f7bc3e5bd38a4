"""Diffusion Transformer (Peebles and Xie, Scalable Diffusion Models with Transformers, 2022), conditioned on classes.

Names in the state dict are the field's (DiT, SiT, REPA): `x_embedder.proj`, `t_embedder.mlp`, `y_embedder.embedding_table`,
`pos_embed`, `blocks.N.attn.qkv`, `blocks.N.adaLN_modulation.1`, `final_layer.linear`, so that weights go both ways.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import mmgen_kernels as mk

FREQUENCY_CHANNELS = 256  # of the sines and cosines of a timestep
MAX_PERIOD = 10_000.0


@dataclass(frozen=True)
class DiTConfig:
    input_size: int = 32  # height and width of the latents, or of the images where there is no tokenizer
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1  # above 0 there is a label more, `num_classes`, that stands for none
    num_classes: int = 1000
    learn_sigma: bool = True  # as many channels again at the output, for the variance

    def __post_init__(self):
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size must be divisible by patch_size {self.patch_size}, got {self.input_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, for sin and cos of two axes, got {self.hidden_size}")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must be in [0, 1), got {self.class_dropout_prob}")

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def grid_size(self) -> int:
        """Patches along a side."""
        return self.input_size // self.patch_size


def position_embedding(channels: int, grid_size: int) -> Tensor:
    """Sines and cosines of each patch's place, (grid_size^2, channels): of its column in the first half, its row in the second.

    A half holds ``sin(p w)`` and then ``cos(p w)`` with ``w = 10000^(-i / (channels / 4))``.
    """
    quarter = channels // 4
    frequencies = MAX_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # (quarter,)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid_size, quarter)
    of_place = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, channels / 2)
    columns, rows = of_place.repeat(grid_size, 1), of_place.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def timestep_embedding(timesteps: Tensor, channels: int = FREQUENCY_CHANNELS) -> Tensor:
    """``cos(t w)`` and then ``sin(t w)`` with ``w = 10000^(-i / (channels / 2))``, (B, channels), fp32."""
    half = channels // 2
    i = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(MAX_PERIOD) / half * i)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) -> a token for each patch, (B, T, D), row by row."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        for parameter in self.proj.parameters():
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.proj.weight.view(config.hidden_size, -1))  # as the linear map that it is

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,), whole or not -> (B, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        first, second = nn.Linear(FREQUENCY_CHANNELS, hidden_size), nn.Linear(hidden_size, hidden_size)
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timesteps).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D); in training a share `dropout_prob` of them is replaced by `num_classes`, which stands for no label."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob  # (B,)
            labels = labels.masked_fill(dropped, self.num_classes)
        return self.embedding_table(labels)


class DiT(nn.Module):
    """Noised images or latents, their timesteps and labels -> what the model was trained to predict of them.

    ``x = patches(x) + positions``, ``c = MLP(frequencies(t)) + table[y]``, blocks conditioned on c, and a last layer that gives the
    patches back. The blocks start as the identity and the last layer as zero (adaLN-Zero).

    Shape:
        x (B, C, S, S) with S = input_size; t (B,), int or float, 0..1000 from data to noise; y (B,), int64, `num_classes` for no
        label. The result is (B, out_channels, S, S).

    Raises:
        ValueError: x has another shape.

    NaN: of an element spoils its sample.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_embedding(width, config.grid_size)[None].to(self.x_embedder.proj.weight))
        self.blocks = nn.ModuleList(mk.nn.DiTBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and "adaLN_modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.final_layer = mk.nn.FinalLayer(width, config.patch_size, config.out_channels)

    @property
    def no_label(self) -> int:
        """The label that stands for none, which classifier-free guidance asks for."""
        if not self.config.class_dropout_prob:
            raise ValueError("a model with class_dropout_prob 0 knows no absent label: train it with labels dropped to guide it")
        return self.config.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        config = self.config
        expected = (config.in_channels, config.input_size, config.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"x must be (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p * p * C) -> (B, C, S, S)."""
        grid, p = self.config.grid_size, self.config.patch_size
        patches = patches.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))  # (B, row, column, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, grid * p, grid * p)


SIZES = {  # depth, hidden_size, num_heads: table 1 of the paper
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def named(size: str, patch_size: int, **options) -> DiT:
    """A configuration of the paper; `options` are DiTConfig's other fields."""
    depth, hidden_size, num_heads = SIZES[size]
    return DiT(DiTConfig(patch_size=patch_size, depth=depth, hidden_size=hidden_size, num_heads=num_heads, **options))


DiT_S_2, DiT_S_4, DiT_S_8 = (partial(named, "S", p) for p in (2, 4, 8))
DiT_B_2, DiT_B_4, DiT_B_8 = (partial(named, "B", p) for p in (2, 4, 8))
DiT_L_2, DiT_L_4, DiT_L_8 = (partial(named, "L", p) for p in (2, 4, 8))
DiT_XL_2, DiT_XL_4, DiT_XL_8 = (partial(named, "XL", p) for p in (2, 4, 8))

DiT_models: dict[str, Callable[..., DiT]] = {
    "DiT-S/2": DiT_S_2, "DiT-S/4": DiT_S_4, "DiT-S/8": DiT_S_8,
    "DiT-B/2": DiT_B_2, "DiT-B/4": DiT_B_4, "DiT-B/8": DiT_B_8,
    "DiT-L/2": DiT_L_2, "DiT-L/4": DiT_L_4, "DiT-L/8": DiT_L_8,
    "DiT-XL/2": DiT_XL_2, "DiT-XL/4": DiT_XL_4, "DiT-XL/8": DiT_XL_8,
}  # fmt: skip
