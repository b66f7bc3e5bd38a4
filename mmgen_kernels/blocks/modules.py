"""The family as modules: mk.nn."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgen_kernels.blocks.checks import ACTIVATIONS, check_split
from mmgen_kernels.blocks.ops import dit_block
from mmgen_kernels.checks import NORMS, check_choice
from mmgen_kernels.modulation.ops import adaln


class DiTBlock(nn.Module):
    """A block of a Diffusion Transformer with adaLN-Zero conditioning, as one autograd node: `mk.dit_block`.

    ``x = x + gate_msa * attn(n(x) * (1 + scale_msa) + shift_msa)`` and then the same with the MLP, where the six vectors are
    ``Linear(SiLU(c))``. The keys of the state dict are those of DiT, SiT and their kin: ``attn.qkv``, ``attn.proj``, ``mlp.fc1``,
    ``mlp.fc2`` and ``adaLN_modulation.1``; norms without weights have none. The Linear of the vectors is zero at first, and the
    block the identity.

    Args:
        hidden_size: D.
        num_heads: H, a divisor of D; D / H is a multiple of 8 up to 256.
        mlp_ratio: width of the MLP, in D.
        activation: "gelu_tanh", "gelu" or "swiglu", which has mlp.fc1 twice as wide.
        norm: "layer" or "rms".
        elementwise_affine: whether the norms have weights (and, layer norms, biases) of their own: ``norm1`` and ``norm2``.
        eps: added to the variance.
        qkv_bias: whether attn.qkv has a bias.
        qk_norm: None, "rms" or "layer": a norm of each head's queries and keys, with weights ``attn.q_norm`` and ``attn.k_norm``.
        interleaved: which channels cos and sin turn together, as in `mk.qk_norm_rope`.
        cond_dim: of c; None is D.

    Shape:
        x (B, T, D); c (B, C) for whole samples, (B, F, C) for frames of equal length (F = T: for tokens) or, with rows, (R, C):
        token t takes row ``rows[t]``. cos, sin, key_lengths and cu_seqlens as in `mk.dit_block`. The result has x's shape and
        dtype.

    Raises:
        TypeError, ValueError: as `mk.dit_block`; or activation, norm or qk_norm is none of these, or num_heads does not divide
            hidden_size so.

    NaN: as in `mk.dit_block`; one in c spoils what it conditions.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, section 3.2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        activation: str = "gelu_tanh",
        norm: str = "layer",
        elementwise_affine: bool = False,
        eps: float = 1e-6,
        qkv_bias: bool = True,
        qk_norm: str | None = None,
        interleaved: bool = False,
        cond_dim: int | None = None,
    ):
        super().__init__()
        if qk_norm is not None:
            check_choice("qk_norm", qk_norm, NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("norm", norm, NORMS)
        check_split(hidden_size, num_heads)
        D, M = hidden_size, int(hidden_size * mlp_ratio)
        self.num_heads, self.activation, self.norm, self.eps = num_heads, activation, norm, eps
        self.qk_norm, self.interleaved = qk_norm, interleaved
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D, bias=qkv_bias), "proj": nn.Linear(D, D)})
        for name in ("q_norm", "k_norm") if qk_norm is not None else ():
            self.attn[name] = Affine(D // num_heads, qk_norm == "layer")
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, 2 * M if activation == "swiglu" else M), "fc2": nn.Linear(M, D)})
        self.norm1, self.norm2 = (Affine(D, norm == "layer") if elementwise_affine else None for _ in range(2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D if cond_dim is None else cond_dim, 6 * D))
        for parameter in self.adaLN_modulation.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        rows: Tensor | None = None,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        vectors = self.adaLN_modulation(c).chunk(6, dim=-1)  # (B, D) or (B, F, D) each, views
        linears = (self.attn["qkv"], self.attn["proj"], self.mlp["fc1"], self.mlp["fc2"])
        projections = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
        norms = {
            f"{name}_{parameter}": getattr(getattr(self, name), parameter)
            for name in ("norm1", "norm2")
            for parameter in ("weight", "bias")
            if getattr(self, name) is not None
        }
        if self.qk_norm is not None:
            norms |= {f"{n}_{p}": getattr(self.attn[f"{n}_norm"], p) for n in ("q", "k") for p in ("weight", "bias")}
        return dit_block(
            x, *vectors, *projections, num_heads=self.num_heads, activation=self.activation, norm=self.norm, eps=self.eps,
            qk_norm=self.qk_norm, qk_eps=self.eps, cos=cos, sin=sin, interleaved=self.interleaved, rows=rows,
            key_lengths=key_lengths, cu_seqlens=cu_seqlens, **norms,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, activation={self.activation!r}, norm={self.norm!r}, eps={self.eps}"


class Affine(nn.Module):
    """The weights of a norm that somebody else computes."""

    def __init__(self, dim: int, has_bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if has_bias else None


class FinalLayer(nn.Module):
    """What turns a Diffusion Transformer's tokens into patches: ``linear(n(x) * (1 + scale) + shift)`` with the vectors of c.

    ``shift, scale = Linear(SiLU(c))``.
    The keys of the state dict are those of DiT and its kin, ``linear`` and ``adaLN_modulation.1``; both are zero at first.

    Args:
        hidden_size: D.
        patch_size: p, of square patches.
        out_channels: of the image; a token becomes p * p * out_channels numbers.
        norm, eps, cond_dim: as in DiTBlock.

    Shape:
        x (B, T, D), c as in DiTBlock; the result is (B, T, p * p * out_channels).

    Raises:
        TypeError, ValueError: as `mk.adaln`; or norm is neither.

    NaN: one in a token spoils that token, one in c what it conditions.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, section 3.2.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        out_channels: int,
        *,
        norm: str = "layer",
        eps: float = 1e-6,
        cond_dim: int | None = None,
    ):
        super().__init__()
        check_choice("norm", norm, NORMS)
        self.norm, self.eps = norm, eps
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        conditioning = hidden_size if cond_dim is None else cond_dim
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(conditioning, 2 * hidden_size))
        for parameter in (*self.linear.parameters(), *self.adaLN_modulation.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor, rows: Tensor | None = None) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # (B, D) or (B, F, D), views
        return F.linear(adaln(x, shift, scale, norm=self.norm, eps=self.eps, rows=rows), self.linear.weight, self.linear.bias)

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}, eps={self.eps}"
