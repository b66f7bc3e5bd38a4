"""diffusers' transformer blocks of two streams, text and image: JointTransformerBlock (Stable Diffusion 3 and 3.5) and FLUX's two.

As in diffusers_blocks.py. The streams are not joined for the attention: each has its own norms, rows of the rotary tables and
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.patching.diffusers_attention import (
    ADDED,
    attended,
    attention_reasons,
    fed_forward,
    feed_forward_reasons,
    head_dim_of,
    modulated,
    projected,
)
from mmgen_kernels.patching.diffusers_blocks import (
    SAMPLES,
    TEXT,
    TOKENS,
    BlockForward,
    BlockRule,
    is_conditioning,
    layer_reasons,
    vectors_of,
    zero_norm_reasons,
)
from mmgen_kernels.patching.rule import Call, Rule

LARGEST_HALF = 65504  # to which FLUX clips fp16


class TwoStreamForward(BlockForward):
    attentions, feed_forwards = ("attn", "attn2"), ("ff", "ff_context")

    def fused(
        self, x: Tensor, context: Tensor, temb: Tensor, of_context: dict[str, Any] | None = None, of_x: dict[str, Any] | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """(context, x); `of_context` and `of_x` are the rotary tables of each stream, if any."""
        module: Any = self.module
        attn, norm, norm_context = module.attn, module.norm1, module.norm1_context
        shift, scale, gate, *rest = vectors_of(norm, temb, norm.linear.out_features // x.shape[-1])  # (B, D) each
        of_mlp, of_alone = rest[:3], rest[3:]
        if of_alone:  # two outputs of one norm
            h, h_alone = modulated(norm.norm, x, (shift, of_alone[0]), (scale, of_alone[1]))
        else:
            h = modulated(norm.norm, x, shift, scale)
        last = is_last(module)
        of_update: list[Tensor] = []
        if last:
            vectors = norm_context.linear(norm_context.silu(temb).to(context.dtype))
            scale_context, shift_context = vectors.chunk(2, dim=1)
        else:
            shift_context, scale_context, *of_update = vectors_of(norm_context, temb, 6)
        h_context = modulated(norm_context.norm, context, shift_context, scale_context)
        streams = projected(attn, h_context, ADDED, **(of_context or {})), projected(attn, h, **(of_x or {}))
        seen_context, seen = mk.joint_attention(*zip(*streams, strict=True))
        x = mk.gate_residual(x, attn.to_out[0](seen.flatten(2)), gate)
        if of_alone:
            x = mk.gate_residual(x, attended(module.attn2, h_alone), of_alone[2])
        x = fed_forward(module.ff, module.norm2, x, *of_mlp)
        if last:
            return None, x
        gate_context, *of_mlp = of_update
        context = mk.gate_residual(context, attn.to_add_out(seen_context.flatten(2)), gate_context)
        return fed_forward(module.ff_context, module.norm2_context, context, *of_mlp), x


def is_last(module: Any) -> bool:
    """Whether it is the block of a model that returns no text."""
    return bool(getattr(module, "context_pre_only", False))


class JointForward(TwoStreamForward):
    processor = "JointAttnProcessor2_0"

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Any, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor | None, Tensor]:
        x, context = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or not (self.serves(x, context) and is_conditioning(temb, x)):
            return self.stock(x, context, temb, joint_attention_kwargs)
        return self.fused(x, context, temb)


class FluxForward(TwoStreamForward):
    processor = "FluxAttnProcessor"

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Any, image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        x, context, rope = hidden_states, encoder_hidden_states, image_rotary_emb
        if joint_attention_kwargs or not (self.serves(x, context) and is_conditioning(temb, x) and self.turns(rope, context, x)):
            return self.stock(x, context, temb, rope, joint_attention_kwargs)
        S = context.shape[1]
        updated, x = self.fused(x, context, temb, rotary(rope, slice(0, S)), rotary(rope, slice(S, None)))
        return clipped(updated), x

    def turns(self, rope: Any, context: Tensor, x: Tensor) -> bool:
        module: Any = self.module
        return is_rotary(rope, (context.shape[1] + x.shape[1], head_dim_of(module.attn)), x.device)


class FluxSingleForward(BlockForward):
    processor, feed_forwards, others = "FluxAttnProcessor", (), ("proj_mlp", "proj_out")
    fewest = 0  # what stock does to queries and keys takes longer

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Any, image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        module: Any = self.module
        x, context, rope = hidden_states, encoder_hidden_states, image_rotary_emb
        if (
            joint_attention_kwargs
            or not (self.serves(x, context) and is_conditioning(temb, x))
            or not is_rotary(rope, (context.shape[1] + x.shape[1], head_dim_of(module.attn)), x.device)
        ):
            return self.stock(x, context, temb, rope, joint_attention_kwargs)
        S = context.shape[1]
        x = torch.cat([context, x], dim=1)  # here both streams have the same weights
        shift, scale, gate = vectors_of(module.norm, temb, 3)
        h = modulated(module.norm.norm, x, shift, scale)
        seen = mk.attention(*projected(module.attn, h, **rotary(rope, slice(None)))).flatten(2)
        y = module.proj_out(torch.cat([seen, module.act_mlp(module.proj_mlp(h))], dim=2))
        x = clipped(mk.gate_residual(x, y, gate))
        return x[:, :S], x[:, S:]


def is_rotary(rope: Any, shape: tuple[int, int], device: torch.device) -> bool:
    """None, or tables (cos, sin), (tokens, head_dim): FLUX's have each angle twice, for neighbours."""
    if rope is None:
        return True
    if not isinstance(rope, (tuple, list)) or len(rope) != 2 or not all(isinstance(t, Tensor) for t in rope):
        return False
    known = all(t.shape == shape and t.dtype in DTYPES and t.device == device and not t.requires_grad for t in rope)
    return known and rope[0].dtype == rope[1].dtype


def rotary(rope: Any, tokens: slice) -> dict[str, Any]:
    if rope is None:
        return {}
    cos, sin = rope
    return {"cos": cos[tokens, ::2], "sin": sin[tokens, ::2], "interleaved": True}


def clipped(x: Any) -> Any:
    return x.clip(-LARGEST_HALF, LARGEST_HALF) if x.dtype == torch.float16 else x


# -- rules ------------------------------------------------------------------------------------------------------------


class JointRule(BlockRule):
    """Both streams are what DiT's block is, with weights of their own, and attend to each other."""

    by = "mk.adaln, mk.joint_attention, mk.adaln_mlp"
    parts = ("norm1", "norm1_context", "attn", "norm2", "ff")
    arguments: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs")
    served_by: type[BlockForward] = JointForward
    # what is added to all keys adds the same to all logits of a query, with a norm after it nearly so: mostly roundings are left
    vanishing = ("attn.to_k.bias", "attn.add_k_proj.bias", "attn2.to_k.bias")

    def reasons_against(self, module: Any) -> list[str]:
        D, last = self.width(module), is_last(module)
        attn, attn2 = module.attn, getattr(module, "attn2", None)
        reasons = list(attention_reasons("attn", attn, self.served_by.processor, joint=True))
        reasons += feed_forward_reasons("ff", module.ff, D) + layer_reasons("norm2", module.norm2, D)
        reasons += zero_norm_reasons("norm1", module.norm1, D, 6 if attn2 is None else 9)
        reasons += zero_norm_reasons("norm1_context", module.norm1_context, D, 2 if last else 6)
        if attn2 is not None:
            reasons += attention_reasons("attn2", attn2, self.served_by.processor)
        if not last:
            reasons += feed_forward_reasons("ff_context", getattr(module, "ff_context", None), D)
            reasons += layer_reasons("norm2_context", getattr(module, "norm2_context", None), D)
            if not isinstance(getattr(attn, "to_add_out", None), nn.Linear):
                reasons.append("attn has no to_add_out")
        return reasons

    def width(self, module: Any) -> int:
        return getattr(getattr(module.attn, "to_q", None), "in_features", 0)

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        yield self.streams(module, module.norm1, draw), {}

    def streams(self, module: Any, norm: Any, draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        D = self.width(module)
        return draw(SAMPLES, TOKENS, D), draw(SAMPLES, TEXT, D), draw(SAMPLES, norm.linear.in_features)


ROTARY = "image_rotary_emb is not (cos, sin) of all tokens, text first, each (tokens, head_dim)"


class FluxRule(JointRule):
    by = "mk.adaln, mk.qk_norm_rope, mk.joint_attention, mk.adaln_mlp"
    arguments = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs")
    served_by: type[BlockForward] = FluxForward
    falls_back_when = (*BlockRule.falls_back_when, ROTARY)

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        streams = self.streams(module, module.norm1, draw)
        yield streams, {"image_rotary_emb": drawn_tables(module, draw)}
        yield streams, {}


class FluxSingleRule(FluxRule):
    """One stream of both, whose attention and MLP are two halves of one sum."""

    by = "mk.adaln, mk.qk_norm_rope, mk.attention"
    parts = ("norm", "proj_mlp", "act_mlp", "proj_out", "attn")
    served_by = FluxSingleForward

    def reasons_against(self, module: Any) -> list[str]:
        D = self.width(module)
        reasons = list(attention_reasons("attn", module.attn, FluxSingleForward.processor))
        reasons += zero_norm_reasons("norm", module.norm, D, 3)
        if getattr(module.attn, "to_out", None) is not None:
            reasons.append("attn has a projection of its own, to_out")
        for name in FluxSingleForward.others:
            if type(getattr(module, name)) is not nn.Linear:
                reasons.append(f"{name} is a {type(getattr(module, name)).__name__}, not an nn.Linear")
        return reasons

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        streams = self.streams(module, module.norm, draw)
        yield streams, {"image_rotary_emb": drawn_tables(module, draw)}
        yield streams, {}


def drawn_tables(module: Any, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    angles = draw(TEXT + TOKENS, head_dim_of(module.attn) // 2).float().repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


RULES: tuple[Rule, ...] = (JointRule(), FluxRule(), FluxSingleRule())
