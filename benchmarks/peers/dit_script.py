"""A Diffusion Transformer and its training step as scripts have them: Peebles and Xie 2022 in plain PyTorch, with the names of its
checkpoints. The patches' embedding and the optimizer are what a script would use; nothing here is fused by hand."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, head_dim)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, num_heads), MLP(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Latents (B, 4, S, S), times (B,), labels (B,) -> noise and variance as patches (B, T, patch * patch * 8)."""

    def __init__(self, dim: int, depth: int, num_heads: int, size: int = 32, patch: int = 2):
        super().__init__()
        self.dim = dim
        self.x_embedder = nn.Conv2d(4, dim, patch, stride=patch)
        self.t_embedder = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = nn.Embedding(1001, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2, dim))
        self.blocks = nn.ModuleList([DiTBlock(dim, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, patch, 8)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():  # as after some training: with vectors of zeros nothing would happen
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(128, device=t.device) / 128 * 9.21034037)  # 10000^(-i / 128)
        angles = t[:, None] * frequencies  # (B, 128)
        c = self.t_embedder(torch.cat((angles.cos(), angles.sin()), -1).to(self.pos_embed.dtype)) + self.y_embedder(y)
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    averages = dict(ema_model.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


class LatentDiT(DiT):
    """DiT with its patches put together: latents (B, 4, S, S) -> noise and variance (B, 8, S, S)."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        side, size = x.shape[-1] // (patch := self.x_embedder.stride[0]), x.shape[-1]
        patches = super().forward(x, t, y).unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, size, size)


def training_step(
    model, ema, optimizer, diffusion, update_ema, x: Tensor, y: Tensor, autocast: torch.dtype | None = None
) -> Tensor:
    """A step of DiT's training: latents (B, 4, S, S) and labels (B,). `autocast`: the dtype that forward and losses are cast to."""
    t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],), device=x.device)
    with torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext():
        loss = diffusion.training_losses(model, x, t, {"y": y})["loss"].mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_ema(ema, model)
    return loss.detach()
