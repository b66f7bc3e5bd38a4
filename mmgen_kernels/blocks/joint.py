"""The joint block of MMDiT as a module: mk.nn.JointDiTBlock."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmgen_kernels.attn.joint_attention import joint_attention
from mmgen_kernels.attn.ops import attention
from mmgen_kernels.attn.qk_norm_rope import qk_norm_rope
from mmgen_kernels.blocks.checks import check_split
from mmgen_kernels.blocks.modules import Affine
from mmgen_kernels.blocks.ops import adaln_mlp
from mmgen_kernels.checks import NORMS, check_choice
from mmgen_kernels.modulation.ops import adaln, gate_residual

Projected = tuple[Tensor, Tensor, Tensor]  # q, k, v, (B, T, H, D / H) each


class JointDiTBlock(nn.Module):
    """A block of MMDiT: text and image have weights of their own and attend to each other.

    Each stream is what a DiT block is, ``x + gate * proj(attention)`` and the MLP, and queries see the keys of both streams. The
    keys of the state dict are those of Stable Diffusion 3: ``context_block`` and ``x_block``, each with ``adaLN_modulation.1``,
    ``attn.qkv``, ``attn.proj``, ``attn.ln_q``, ``attn.ln_k``, ``mlp.fc1`` and ``mlp.fc2``. Neither stream is copied for the
    attention, and the MLPs are one autograd node each. The Linears of the vectors are zero at first, and the block the identity.

    Args:
        hidden_size: D.
        num_heads: H, a divisor of D; D / H is a multiple of 8 up to 256.
        mlp_ratio: width of the MLPs, in D.
        qk_norm: None, "rms" (Stable Diffusion 3.5) or "layer": a norm of each head's queries and keys, with weights.
        dual_attention: x also attends to itself alone, ``x_block.attn2``, as in the first blocks of Stable Diffusion 3.5 medium.
        context_pre_only: the last block of a model, which returns no context: its context_block has no more than ``attn.qkv`` and
            two vectors.
        eps: added to the variance, of every norm.
        cond_dim: of c; None is D.

    Shape:
        context (B, S, D), x (B, T, D), c (B, C); context_lengths (B,), integers, are the tokens of each text that are seen.
        Returns (context, x) of the same shapes, context None if context_pre_only.

    Raises:
        TypeError, ValueError: as `mk.adaln`, `mk.qk_norm_rope` and `mk.joint_attention`; or qk_norm is none of these, or num_heads
            does not divide hidden_size so.

    NaN: one in a token or in c spoils its sample and no other; tokens of context beyond context_lengths spoil only themselves.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, section 4 and figure 2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: str | None = None,
        dual_attention: bool = False,
        context_pre_only: bool = False,
        eps: float = 1e-6,
        cond_dim: int | None = None,
    ):
        super().__init__()
        if qk_norm is not None:
            check_choice("qk_norm", qk_norm, NORMS)
        check_split(hidden_size, num_heads)
        self.num_heads, self.qk_norm, self.eps = num_heads, qk_norm, eps
        self.context_pre_only, self.dual_attention = context_pre_only, dual_attention
        sizes = (hidden_size, num_heads, int(hidden_size * mlp_ratio), hidden_size if cond_dim is None else cond_dim)
        self.context_block = Stream(*sizes, 2 if context_pre_only else 6, qk_norm)
        self.x_block = Stream(*sizes, 9 if dual_attention else 6, qk_norm)

    def forward(
        self, context: Tensor, x: Tensor, c: Tensor, *, context_lengths: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        of_context: Any
        of_x: Any
        of_context, of_x = self.context_block, self.x_block
        shift_context, scale_context, *rest_of_context = of_context.vectors(c)  # (B, D) each
        shift, scale, gate, *rest = of_x.vectors(c)
        h_context = adaln(context, shift_context, scale_context, eps=self.eps)
        if self.dual_attention:  # two outputs of one norm
            h, h_alone = adaln(x, [shift, rest[3]], [scale, rest[4]], eps=self.eps)
        else:
            h = adaln(x, shift, scale, eps=self.eps)
        streams = (self.projected(of_context.attn, h_context), self.projected(of_x.attn, h))
        seen = None if context_lengths is None else (context_lengths, None)
        attended_context, attended = joint_attention(*zip(*streams, strict=True), key_lengths=seen)
        x = gate_residual(x, of_x.attn["proj"](attended.flatten(2)), gate)
        if self.dual_attention:
            attended = attention(*self.projected(of_x.attn2, h_alone))
            x = gate_residual(x, of_x.attn2["proj"](attended.flatten(2)), rest[5])
        x = of_x.feed_forward(x, *rest[:3], self.eps)
        if self.context_pre_only:
            return None, x
        gate_context, *rest_of_context = rest_of_context
        context = gate_residual(context, of_context.attn["proj"](attended_context.flatten(2)), gate_context)
        return of_context.feed_forward(context, *rest_of_context, self.eps), x

    def projected(self, attn: Any, h: Tensor) -> Projected:
        q, k, v = attn["qkv"](h).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # views of the projection
        if self.qk_norm is not None:
            of_q, of_k = attn["ln_q"], attn["ln_k"]
            affine = {"q_weight": of_q.weight, "k_weight": of_k.weight, "q_bias": of_q.bias, "k_bias": of_k.bias}
            q, k = qk_norm_rope(q, k, norm=self.qk_norm, eps=self.eps, **affine)
        return q, k, v

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, qk_norm={self.qk_norm!r}, eps={self.eps}"


class Stream(nn.Module):
    """What belongs to one stream; `vectors` counts those of its modulation: 2 without a way back, 9 with two attentions."""

    def __init__(self, dim: int, num_heads: int, width: int, cond_dim: int, vectors: int, qk_norm: str | None):
        super().__init__()
        self.count = vectors
        self.attn = self.attention(dim, num_heads, qk_norm, vectors > 2)
        if vectors == 9:
            self.attn2 = self.attention(dim, num_heads, qk_norm, True)
        if vectors > 2:
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, width), "fc2": nn.Linear(width, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, vectors * dim))
        for parameter in self.adaLN_modulation.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def attention(dim: int, num_heads: int, qk_norm: str | None, has_projection: bool) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {"qkv": nn.Linear(dim, 3 * dim)}
        if has_projection:
            parts["proj"] = nn.Linear(dim, dim)
        for name in ("ln_q", "ln_k") if qk_norm is not None else ():
            parts[name] = Affine(dim // num_heads, qk_norm == "layer")
        return nn.ModuleDict(parts)

    def vectors(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(c).chunk(self.count, dim=-1)

    def feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, eps: float) -> Tensor:
        mlp: Any = self.mlp
        fc1, fc2 = mlp["fc1"], mlp["fc2"]
        return adaln_mlp(x, shift, scale, gate, fc1.weight, fc1.bias, fc2.weight, fc2.bias, eps=eps)
