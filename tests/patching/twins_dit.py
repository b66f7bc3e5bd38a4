"""A stand-in for the scripts that follow DiT, written from the paper's formulas and the names in its checkpoints, with the parts
that timm gives them."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm=None, attn_drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (qk_norm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (B, H, T, head_dim)
        q, k, p = self.q_norm(q), self.k_norm(k), self.attn_drop.p if self.training else 0.0
        if rope is not None:
            q, k = rope(q).to(v.dtype), rope(k).to(v.dtype)  # fp32 tables widen them
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class RotaryEmbedding(nn.Module):
    """Of a square of tokens: half of a head's channels turn by the row, half by the column, in pairs of neighbours (RoFormer)."""

    def __init__(self, head_dim, side, neighbours=True):
        super().__init__()
        P, self.neighbours = head_dim // 4, neighbours
        angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(P) / P)  # (side, P)
        both = torch.cat((angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)), -1).flatten(0, 1)
        self.register_buffer("freqs_cos", both.repeat_interleave(2, -1).cos())  # (side^2, head_dim)
        self.register_buffer("freqs_sin", both.repeat_interleave(2, -1).sin())

    def forward(self, t):
        a, b = t.unflatten(-1, (-1, 2)).unbind(-1) if self.neighbours else t.chunk(2, -1)
        turned = torch.stack((-b, a), -1).flatten(-2) if self.neighbours else torch.cat((-b, a), -1)
        return t * self.freqs_cos + turned * self.freqs_sin


class MLP(nn.Module):
    def __init__(self, dim, hidden, approximate="tanh"):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(approximate), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def modulated(norm, x, shift, scale):
    return norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, approximate="tanh", affine=False, **attention):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=affine, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, num_heads, **attention), MLP(dim, int(mlp_ratio * dim), approximate)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulated(self.norm1, x, shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulated(self.norm2, x, shift_mlp, scale_mlp))


class LightningDiTBlock(nn.Module):
    """RMS norms, SwiGLU, a norm of queries and keys, an embedding of positions as an argument and, without shifts, four vectors."""

    def __init__(self, dim, num_heads, shifts=True):
        super().__init__()
        self.norm1, self.norm2, self.shifts = RMSNorm(dim), RMSNorm(dim), shifts
        self.attn, self.mlp = Attention(dim, num_heads, qk_norm=RMSNorm), SwiGLU(dim, 2 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if shifts else 4) * dim))

    def forward(self, x, c, feat_rope=None):
        vectors = self.adaLN_modulation(c)
        if self.shifts:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors.chunk(6, dim=1)
        else:
            scale_msa, gate_msa, scale_mlp, gate_mlp = vectors.chunk(4, dim=1)
            shift_msa = shift_mlp = torch.zeros_like(scale_msa)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulated(self.norm1, x, shift_msa, scale_msa), rope=feat_rope)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulated(self.norm2, x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final, x, shift, scale))


class DiT(nn.Module):
    """Tokens (B, T, D) and a conditioning (B, D) to patches: what is around the blocks is not of interest here."""

    def __init__(self, dim=48, depth=3, num_heads=2, patch_size=2, out_channels=8, **block):
        super().__init__()
        self.blocks = nn.ModuleList([DiTBlock(dim, num_heads, **block) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, patch_size, out_channels)

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def drawn(model, seed=0):
    """Values for all parameters, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model
