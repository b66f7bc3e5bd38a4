"""diffusers' transformer blocks: BasicTransformerBlock as DiT, PixArt and Latte have it.

Recognised by their parts and by the arguments of forward, in the package and in copies of its files. What a forward does beyond its
parts, verification must tell. A call with anything that this file does not name is stock's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.patching.diffusers_attention import (
    attended,
    attended_across,
    attention_reasons,
    fed_forward,
    feed_forward_reasons,
    is_as_written,
    is_run_by,
    linears_of,
    modulated,
    present,
)
from mmgen_kernels.patching.dit import is_plain, norm_reasons
from mmgen_kernels.patching.rule import Call, Forward, Rule, parameters_of_forward

SAMPLES, TOKENS, TEXT = 2, 12, 4  # in the calls of verification
HALVES = (torch.float16, torch.bfloat16)


class BlockForward(Forward):
    """Of blocks made of attentions, feed-forwards and norms whose vectors come from the conditioning."""

    processor: str  # the class of the attentions' processors
    attentions: tuple[str, ...] = ("attn",)  # those that a block may have
    feed_forwards: tuple[str, ...] = ("ff",)
    others: tuple[str, ...] = ()  # further projections
    # On the CPU an operator costs 0.1 ms of the host's time, forward and backward. In fp32, where products take most of a block's
    # time, that is not earned by fewer numbers than these: 0.94 of stock's speed with 2^15, 1.0 with 2^17. In bf16 it is.
    fewest = 1 << 17

    def serves(self, *streams: Any) -> bool:
        """Whether these are tokens (B, T, D) as verification has seen them, and everybody who may listen to a part is absent."""
        module, x = self.module, streams[0]
        if not all(
            isinstance(s, Tensor) and s.dim() == 3 and (s.dtype, s.device, len(s)) == (x.dtype, x.device, len(x)) for s in streams
        ):
            return False
        kind = x.device.type
        if x.dtype not in DTYPES or kind not in ("cpu", "cuda") or getattr(module, "_chunk_size", None) is not None:
            return False
        autocast = torch.is_autocast_enabled(kind)
        if (kind == "cpu" and not autocast and x.dtype not in HALVES and x.numel() < self.fewest) or not is_as_written(module):
            return False
        attentions, linears = present(module, self.attentions), present(module, self.others)
        linears += [linear for part in (*attentions, *present(module, self.feed_forwards)) for linear in linears_of(part)]
        if not all(is_run_by(attn, self.processor) for attn in attentions) or not all(is_plain(linear) for linear in linears):
            return False
        if autocast:  # the residual keeps x's dtype here, and in stock with vectors of these
            return x.dtype in (torch.float32, torch.get_autocast_dtype(kind))
        return x.dtype == linears[0].weight.dtype


def vectors_of(norm: Any, conditioning: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, D) each, views of one projection: what an adaptive norm makes of the conditioning (B, C)."""
    return norm.linear(norm.silu(conditioning)).chunk(count, dim=1)


def is_conditioning(temb: Any, x: Tensor) -> bool:
    return isinstance(temb, Tensor) and temb.dim() == 2 and len(temb) == len(x)


class BlockRule(Rule):
    """A kind of block."""

    family = "blocks"
    parts: tuple[str, ...]
    arguments: tuple[str, ...]  # of forward
    served_by: type[BlockForward]
    falls_back_when: tuple[str, ...] = (
        "a part of the block has hooks or another forward, or a projection is no nn.Linear any more",
        "an attention has another processor, a backend of its own or fused projections",
        "attention kwargs are given, or the feed-forward is chunked",
        "dropout is active",
        "tokens are not (B, T, D), or the conditioning not one vector for each sample",
        "dtypes are mixed outside of autocast",
        "the device is neither CPU nor CUDA",
        "tokens on the CPU are few (below 2^17 numbers) and neither bf16 nor fp16, which PyTorch's own passes serve as fast",
    )

    def recognises(self, module: nn.Module) -> bool:
        has_parts = all(isinstance(getattr(module, name, None), nn.Module) for name in self.parts)
        return has_parts and tuple(parameters_of_forward(module)) == self.arguments

    def forward(self, module: nn.Module) -> Forward:
        return self.served_by(module)

    def trial(self, module: nn.Module) -> Forward:
        forward = self.served_by(module)
        forward.fewest = 0
        return forward

    def prepare(self, module: nn.Module, draw: Callable[..., Tensor]) -> None:
        """Models begin with projections of zeros, and end with outliers by which all else is small."""
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                ones = "norm" in name and name.endswith("weight")  # where a norm's weights are in a model
                parameter.data.copy_(ones + draw(len(parameter)) / 2)
            elif parameter.dim() == 2:
                rows, columns = parameter.shape  # each row is the one before, moved by one: a number for each would take 0.2 s
                small = 2 if name.endswith(("to_q.weight", "add_q_proj.weight")) else 1  # where softmax is steep, roundings grow
                parameter.data.copy_(draw(rows + columns - 1).unfold(0, columns, 1) / (small * columns**0.5))

    def magnification(self, module: nn.Module) -> float:
        """A gradient passes ten tensors that stock has rounded, where the tolerances are for two."""
        return 5.0**0.5


def layer_reasons(name: str, norm: Any, dim: int) -> list[str]:
    return norm_reasons(name, norm, dim) if isinstance(norm, nn.Module) else [f"{name} is missing"]


def zero_norm_reasons(name: str, norm: Any, dim: int, *counts: int) -> list[str]:
    """Why an adaptive norm is not ``norm(x) * (1 + scale) + shift`` with vectors ``linear(silu(conditioning))``."""
    if any(not isinstance(getattr(norm, part, None), nn.Module) for part in ("silu", "linear", "norm")):
        return [f"{name} is a {type(norm).__name__} without silu, linear and norm"]
    if type(norm.linear) is not nn.Linear or norm.linear.out_features not in [count * dim for count in counts]:
        return [f"{name}.linear does not make {' or '.join(map(str, counts))} vectors of {dim}"]
    return norm_reasons(f"{name}.norm", norm.norm, dim)


# -- DiT, PixArt, Latte -----------------------------------------------------------------------------------------------


class BasicForward(BlockForward):
    processor, attentions = "AttnProcessor2_0", ("attn1", "attn2")

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        module: Any = self.module
        streams = [hidden_states] if module.attn2 is None else [hidden_states, encoder_hidden_states]
        if (
            cross_attention_kwargs
            or not self.serves(*streams)
            or not all(map(is_additive, (attention_mask, encoder_attention_mask), streams))
            or not self.knows(hidden_states, timestep, class_labels)
        ):
            return self.stock(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs,
                class_labels, added_cond_kwargs,
            )  # fmt: skip
        x, bias = hidden_states, None if attention_mask is None else attention_mask.unsqueeze(1)
        if module.norm_type == "ada_norm_zero":
            vectors = vectors_of(module.norm1, module.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype), 6)
            first, second = module.norm1.norm, module.norm3
        else:
            vectors = (module.scale_shift_table + timestep.unflatten(1, (6, -1))).unbind(1)
            first, second = module.norm1, module.norm2
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors  # (B, D) each
        x = mk.gate_residual(x, attended(module.attn1, modulated(first, x, shift_msa, scale_msa), bias), gate_msa)
        if module.attn2 is not None:
            bias = None if encoder_attention_mask is None else encoder_attention_mask.unsqueeze(1)
            x = x + attended_across(module.attn2, x, encoder_hidden_states, bias)
        return fed_forward(module.ff, second, x, shift_mlp, scale_mlp, gate_mlp)

    def knows(self, x: Tensor, timestep: Any, labels: Any) -> bool:
        """Whether the conditioning is one for each sample, and of x's dtype once it is a vector."""
        module: Any = self.module
        if module.norm_type == "ada_norm_zero":
            return all(isinstance(t, Tensor) and t.shape == x.shape[:1] for t in (timestep, labels))
        if not isinstance(timestep, Tensor) or timestep.shape != (len(x), 6 * x.shape[-1]):
            return False
        dtype = torch.promote_types(timestep.dtype, module.scale_shift_table.dtype)
        return dtype == x.dtype or (torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32)


def is_additive(mask: Any, keys: Tensor) -> bool:
    """None, or numbers for the logits of each sample's keys (B, 1, S)."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dtype == keys.dtype and mask.shape == (len(keys), 1, keys.shape[1])


class BasicRule(BlockRule):
    """Modulated self-attention, in PixArt cross-attention without a norm, and a modulated feed-forward."""

    by = "mk.adaln, mk.attention, mk.adaln_mlp"
    parts = ("norm1", "attn1", "ff")
    arguments = (
        "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep", "cross_attention_kwargs",
        "class_labels", "added_cond_kwargs",
    )  # fmt: skip
    served_by = BasicForward
    falls_back_when = (*BlockRule.falls_back_when, "a mask is not one of numbers (B, 1, keys) in the tokens' dtype")
    vanishing = ("attn1.to_k.bias", "attn2.to_k.bias")  # what is added to all keys adds the same to all logits of a query

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and getattr(module, "norm_type", None) in ("ada_norm_zero", "ada_norm_single")

    def reasons_against(self, module: Any) -> list[str]:
        attn1, attn2, D = module.attn1, getattr(module, "attn2", None), self.width(module)
        reasons = list(attention_reasons("attn1", attn1, BasicForward.processor, normed=False))
        reasons += feed_forward_reasons("ff", module.ff, D)
        if module.norm_type == "ada_norm_zero":
            reasons += zero_norm_reasons("norm1", module.norm1, D, 6) + layer_reasons("norm3", getattr(module, "norm3", None), D)
            if getattr(module.norm1, "emb", None) is None:
                reasons.append("norm1 makes no embedding of timesteps and labels")
            if attn2 is not None:
                reasons.append("attn2 stands beside norm_type='ada_norm_zero'")
        else:
            reasons += layer_reasons("norm1", module.norm1, D) + layer_reasons("norm2", getattr(module, "norm2", None), D)
            shape = tuple(getattr(getattr(module, "scale_shift_table", None), "shape", ()))
            if shape != (6, D):
                reasons.append(f"scale_shift_table has shape {shape}, expected {(6, D)}")
            if attn2 is not None:
                reasons += attention_reasons("attn2", attn2, BasicForward.processor, normed=False)
        for name in ("pos_embed", "fuser", "only_cross_attention"):
            if getattr(module, name, None):
                reasons.append(f"it has {name}")
        return reasons

    def width(self, module: Any) -> int:
        return getattr(getattr(module.attn1, "to_q", None), "in_features", 0)

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        D = self.width(module)
        x, mask = draw(SAMPLES, TOKENS, D), draw(SAMPLES, 1, TOKENS)
        if module.norm_type == "ada_norm_zero":
            steps = torch.arange(SAMPLES, device=x.device)
            conditioning = {"timestep": steps, "class_labels": torch.zeros_like(steps)}
            yield (x,), conditioning
            yield (x, mask), conditioning
            return
        timestep = draw(SAMPLES, 6 * D)
        width = D if module.attn2 is None else module.attn2.to_k.in_features
        text, text_mask = draw(SAMPLES, TEXT, width), draw(SAMPLES, 1, TEXT)
        yield (x, mask, text, text_mask, timestep), {}
        yield (x,), {"encoder_hidden_states": text, "timestep": timestep}


RULES: tuple[Rule, ...] = (BasicRule(),)
