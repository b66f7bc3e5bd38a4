"""The family as modules: mk.nn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgen_kernels.checks import NORMS, check_choice
from mmgen_kernels.modulation.ops import adaln, gate_residual_adaln


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, in one pass; statistics in fp32.

    Args:
        dim: D.
        eps: added to the mean square.
        elementwise_affine: whether there is a weight (D,), of ones at first.

    Shape:
        x (N, D) or (B, ..., D); the result has x's shape and dtype, under autocast the autocast dtype.

    Raises:
        TypeError, ValueError: as `mk.adaln`; or x has not ``dim`` channels.

    NaN: as in `mk.adaln`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        check_width("x", x, self.dim)
        return adaln(x, None, None, norm="rms", weight=self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class AdaLayerNorm(nn.Module):
    """``n(x) * (1 + scale) + shift`` with ``shift, scale = Linear(SiLU(cond))``: the norm before DiT's final layer.

    n is a layer norm or an RMS norm, as in `mk.adaln`. ``linear`` gives shift first, then scale, as DiT's checkpoints have it.

    Args:
        dim: D, of x.
        cond_dim: C, of the conditioning; None is D.
        norm: "layer" or "rms".
        elementwise_affine: whether n has a ``weight`` (D,) of its own and, as layer norm, a ``bias`` (D,).
        eps: added to the variance.
        bias: whether the Linear has one.

    Shape:
        x (B, T, D) or (B, ..., D); cond (B, C) for whole samples, (B, F, C) for frames of equal length (F = T: for tokens) or, with
        rows, (R, C): token t takes row ``rows[t]``. The result has x's shape and dtype, under autocast the autocast dtype.

    Raises:
        TypeError, ValueError: as `mk.adaln`; or norm is neither, or x has not ``dim`` channels.

    NaN: as in `mk.adaln`; one in cond spoils what it conditions.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int | None = None,
        *,
        norm: str = "layer",
        elementwise_affine: bool = False,
        eps: float = 1e-6,
        bias: bool = True,
    ):
        super().__init__()
        check_choice("norm", norm, NORMS)
        self.dim, self.norm, self.eps = dim, norm, eps
        self.linear = nn.Linear(dim if cond_dim is None else cond_dim, 2 * dim, bias=bias)
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine and norm == "layer" else None

    def forward(self, x: Tensor, cond: Tensor, rows: Tensor | None = None) -> Tensor:
        check_width("x", x, self.dim)
        shift, scale = self.linear(F.silu(cond)).chunk(2, dim=-1)  # (B, D) or (B, F, D), views
        return adaln(x, shift, scale, norm=self.norm, weight=self.weight, bias=self.bias, eps=self.eps, rows=rows)

    def extra_repr(self) -> str:
        return f"{self.dim}, norm={self.norm!r}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class AdaLNZeroOutput(NamedTuple):
    """What a DiT block needs: the first sub-block's input, and the vectors for the rest."""

    modulated: Tensor  # (B, T, D)
    gate_msa: Tensor  # (B, D) or (B, F, D), as those below
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class AdaLayerNormZero(nn.Module):
    """adaLN-Zero: ``n(x) * (1 + scale_msa) + shift_msa``, and the four vectors that the rest of a DiT block takes.

    ``shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = Linear(SiLU(cond))``. The Linear is zero at first: the gates
    are, and so every block begins as the identity. The norm has no weights of its own. A block is::

        h, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaln(x, cond)
        x, h = self.adaln.seam(x, self.attention(h), gate_msa, shift_mlp, scale_mlp)
        x = mk.gate_residual(x, self.mlp(h), gate_mlp)

    Args:
        dim, cond_dim, norm, eps, bias: as in AdaLayerNorm.

    Shape:
        x, cond and rows as in AdaLayerNorm. Returns AdaLNZeroOutput; its vectors are views (B, D), (B, F, D) or (R, D).

    Raises, NaN:
        as AdaLayerNorm.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, section 3.2.
    """

    def __init__(
        self, dim: int, cond_dim: int | None = None, *, norm: str = "layer", eps: float = 1e-6, bias: bool = True
    ):
        super().__init__()
        check_choice("norm", norm, NORMS)
        self.dim, self.norm, self.eps = dim, norm, eps
        self.linear = nn.Linear(dim if cond_dim is None else cond_dim, 6 * dim, bias=bias)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, cond: Tensor, rows: Tensor | None = None) -> AdaLNZeroOutput:
        check_width("x", x, self.dim)
        shift_msa, scale_msa, *others = self.linear(F.silu(cond)).chunk(6, dim=-1)  # (B, D) or (B, F, D), views
        return AdaLNZeroOutput(adaln(x, shift_msa, scale_msa, norm=self.norm, eps=self.eps, rows=rows), *others)

    def seam(
        self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Between two sub-blocks: ``(x + gate * y, n(x + gate * y) * (1 + scale) + shift)`` in one pass, with this module's norm.

        Args and dtypes are those of `mk.gate_residual_adaln`: the residual keeps x's dtype.
        """
        return gate_residual_adaln(x, y, gate, shift, scale, norm=self.norm, eps=self.eps, rows=rows)

    def extra_repr(self) -> str:
        return f"{self.dim}, norm={self.norm!r}, eps={self.eps}"


def check_width(name: str, x: Tensor, dim: int) -> None:
    if x.shape[-1:] != (dim,):
        raise ValueError(f"{name} must have dim = {dim} as its last size, got shape {tuple(x.shape)}")
