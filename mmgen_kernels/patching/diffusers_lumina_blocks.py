"""diffusers' transformer blocks of Lumina 2: norms before and after each half, gates of tanh, grouped-query heads.

As in diffusers_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.patching.diffusers_attention import attended, attention_reasons, head_dim_of, modulated
from mmgen_kernels.patching.diffusers_blocks import (
    SAMPLES,
    TOKENS,
    BlockForward,
    BlockRule,
    is_conditioning,
    layer_reasons,
    vectors_of,
    zero_norm_reasons,
)
from mmgen_kernels.patching.dit import bias_of, kind_of
from mmgen_kernels.patching.rule import Call, Rule

NORMS = ("ffn_norm1", "norm2", "ffn_norm2")


class LuminaForward(BlockForward):
    processor, feed_forwards = "Lumina2AttnProcessor2_0", ()  # its feed-forward is called as it is: two Linears side by side
    fewest = 0  # what stock does to queries and keys takes longer

    def __call__(self, hidden_states: Tensor, attention_mask: Any, image_rotary_emb: Any, temb: Any = None) -> Tensor:
        module: Any = self.module
        x, rope = hidden_states, image_rotary_emb
        conditioned = is_conditioning(temb, x) if module.modulation else temb is None
        if not (conditioned and self.serves(x) and self.keeps(x.dtype) and is_mask(attention_mask, x) and self.turns(rope, x)):
            return self.stock(x, attention_mask, rope, temb)
        bias, tables = None, {}
        if attention_mask is not None:  # any keys may be hidden, and which ones only the device knows
            hidden = attention_mask.bool().logical_not()[:, None, None]  # (B, 1, 1, T)
            bias = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, -torch.inf)
        if rope is not None:
            tables = {"cos": rope.real, "sin": rope.imag, "interleaved": True}
        scale_msa, gate_msa, scale_mlp, gate_mlp = vectors_of(module.norm1, temb, 4) if module.modulation else (None,) * 4
        norm = module.norm1.norm if module.modulation else module.norm1
        y = attended(module.attn, modulated(norm, x, None, scale_msa), bias, **tables)
        norm = module.ffn_norm1
        x, h = mk.gate_residual_adaln(
            x, y, gate_msa, None, scale_mlp, **sandwiched(gate_msa, module.norm2), norm="rms", weight=norm.weight, eps=norm.eps
        )
        return mk.gate_residual(x, module.feed_forward(h), gate_mlp, **sandwiched(gate_mlp, module.ffn_norm2))

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether stock's residual has this dtype: wider weights of the norms after each half would widen it."""
        module: Any = self.module
        return all(norm.weight is None or norm.weight.dtype == dtype for norm in (module.norm2, module.ffn_norm2))

    def turns(self, rope: Any, x: Tensor) -> bool:
        """Whether these are None, or complex numbers for the pairs of neighbours of each token."""
        if rope is None:
            return True
        known = isinstance(rope, Tensor) and rope.is_complex() and rope.device == x.device and not rope.requires_grad
        return known and rope.shape == (*x.shape[:2], head_dim_of(self.module.attn) // 2)


def sandwiched(gate: Tensor | None, norm: Any) -> dict[str, Any]:
    """The arguments of ``x + tanh(gate) * norm(y)``, and without a gate ``x + norm(y)``."""
    gate_fn = "identity" if gate is None else "tanh"
    return {"gate_fn": gate_fn, "post_norm": "rms", "post_weight": norm.weight, "post_eps": norm.eps}


def is_mask(mask: Any, x: Tensor) -> bool:
    """None, or which tokens are seen as keys (B, T), in any dtype."""
    return mask is None or (isinstance(mask, Tensor) and mask.shape == x.shape[:2] and not mask.requires_grad)


class LuminaRule(BlockRule):
    by = "mk.adaln, mk.qk_norm_rope, mk.attention, mk.gate_residual_adaln"
    parts = ("norm1", "attn", "norm2", "feed_forward", "ffn_norm1", "ffn_norm2")
    arguments = ("hidden_states", "attention_mask", "image_rotary_emb", "temb")
    served_by = LuminaForward
    falls_back_when = (
        *BlockRule.falls_back_when,
        "the mask is not (B, T), or image_rotary_emb not complex numbers (B, T, head_dim / 2)",
    )

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and isinstance(getattr(module, "modulation", None), bool)

    def reasons_against(self, module: Any) -> list[str]:
        attn, D = module.attn, getattr(getattr(module.attn, "to_q", None), "in_features", 0)
        reasons = list(attention_reasons("attn", attn, LuminaForward.processor))
        if module.modulation:
            reasons += zero_norm_reasons("norm1", module.norm1, D, 4)
        norms = {name: getattr(module, name) for name in NORMS}
        norms["norm1"] = module.norm1.norm if module.modulation and not reasons else module.norm1
        for name, norm in norms.items() if not reasons else ():
            reasons += layer_reasons(name, norm, D)
            if kind_of(norm) == "layer" or bias_of(norm) is not None:
                reasons.append(f"{name} is {norm}, not an RMS norm without a bias")
        return reasons

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        x = draw(SAMPLES, TOKENS, module.attn.to_q.in_features)
        angles = draw(SAMPLES, TOKENS, head_dim_of(module.attn) // 2).float()
        rope, seen = torch.polar(torch.ones_like(angles), angles), draw(SAMPLES, TOKENS) > 0
        seen[:, TOKENS // 2] = True  # what sees nothing is another matter
        conditioning = [draw(SAMPLES, module.norm1.linear.in_features)] if module.modulation else []
        yield (x, seen, rope, *conditioning), {}
        yield (x,), {"attention_mask": None, "image_rotary_emb": rope, **({"temb": conditioning[0]} if conditioning else {})}


RULES: tuple[Rule, ...] = (LuminaRule(),)
