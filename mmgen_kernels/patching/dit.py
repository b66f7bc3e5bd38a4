"""Blocks and final layers of Diffusion Transformers in scripts that follow DiT: DiT, fast-DiT, SiT, REPA, LightningDiT.

Recognised by what they have: the scripts are copied, not installed. What a forward does beyond its parts, verification must tell.
LightningDiT's blocks take a rotary embedding, a module, as a third argument. It has a rule of its own, which learns its tables, and
a block reads them where it is given an embedding that this rule serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.patching.rule import ROWS, Call, Forward, Rule, has_hooks, parameters_of_forward

SAMPLES = 2  # in the calls of verification
IDLE = (nn.Identity, nn.Dropout)  # and what is one of these with p = 0 does nothing


class ConditionedForward(Forward):
    """Of modules with ``adaLN_modulation(c)``, whose vectors are (B, D) each."""

    def names_of_linears(self) -> tuple[str, ...]:
        raise NotImplementedError

    def serves(self, x: Any, c: Any) -> bool:
        """Whether the call is the one that verification has seen, and nobody listens to a part of the module."""
        module: Any = self.module
        if not (isinstance(x, Tensor) and isinstance(c, Tensor) and x.dim() == 3 and c.dim() == 2 and x.dtype in DTYPES):
            return False
        if len(x) != len(c):  # stock broadcasts one of them
            return False
        linears = [module.get_submodule(name) for name in self.names_of_linears()]
        if not all(is_plain(linear) for linear in linears) or any(
            has_hooks(child) or "forward" in vars(child) for child in module.modules() if child is not module
        ):
            return False
        # stock promotes mixed dtypes, or refuses them; under autocast the residual keeps x's dtype in stock and here
        same = x.dtype == c.dtype == linears[0].weight.dtype
        return x.device.type in ("cpu", "cuda", "meta") and (same or torch.is_autocast_enabled(x.device.type))


class BlockForward(ConditionedForward):
    def names_of_linears(self) -> tuple[str, ...]:
        module: Any = self.module
        first, second = projections_of(module.mlp)
        return "attn.qkv", "attn.proj", f"mlp.{first}", f"mlp.{second}"

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        return self.fused(x, c) if self.serves(x, c) else self.stock(x, c)

    def fused(self, x: Tensor, c: Tensor, **rope: Any) -> Tensor:
        module: Any = self.module
        attn, mlp, first, second = module.attn, module.mlp, module.norm1, module.norm2
        fc1, fc2 = (getattr(mlp, name) for name in projections_of(mlp))
        vectors: Any = module.adaLN_modulation(c)
        if vectors.shape[-1] == 6 * x.shape[-1]:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors.chunk(6, dim=1)
        else:  # LightningDiT's wo_shift
            (scale_msa, gate_msa, scale_mlp, gate_mlp), shift_msa, shift_mlp = vectors.chunk(4, dim=1), None, None
        norm: Any = kind_of(first)
        return mk.dit_block(
            x, shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, attn.qkv.weight, attn.qkv.bias,
            attn.proj.weight, attn.proj.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
            num_heads=attn.num_heads, activation=activation_of(mlp), norm=norm, eps=first.eps,
            norm1_weight=first.weight, norm1_bias=bias_of(first), norm2_weight=second.weight, norm2_bias=bias_of(second),
            **qk_norm_of(attn), **rope,
        )  # fmt: skip


class RotaryBlockForward(BlockForward):
    """LightningDiT's, with the embedding of positions for all its blocks as an argument."""

    def __call__(self, x: Tensor, c: Tensor, feat_rope: Any = None) -> Tensor:
        if feat_rope is None:
            return super().__call__(x, c)
        embedding = vars(feat_rope).get("forward") if isinstance(feat_rope, nn.Module) else None
        if not (isinstance(embedding, RotaryForward) and self.serves(x, c) and self.turns(feat_rope, x)):
            return self.stock(x, c, feat_rope)
        cos, sin = embedding.tables()
        return self.fused(x, c, cos=cos, sin=sin, interleaved=True)

    def turns(self, rope: Any, x: Tensor) -> bool:
        """Whether the tables are for these tokens, and nobody listens to the embedding."""
        module: Any = self.module
        shape = (x.shape[1], x.shape[2] // module.attn.num_heads)
        return rope.freqs_cos.shape == rope.freqs_sin.shape == shape and rope.freqs_cos.device == x.device and not has_hooks(rope)


class RotaryForward(Forward):
    """Stock's: its tables are what is used, by blocks that are given the embedding."""

    def __call__(self, t: Tensor) -> Tensor:
        return self.stock(t)

    def tables(self) -> tuple[Tensor, Tensor]:
        """(T, head_dim / 2): stock has each angle twice, for both of the channels that it turns into each other."""
        module: Any = self.module
        return module.freqs_cos[:, ::2], module.freqs_sin[:, ::2]


class TablesForward(RotaryForward):
    """Turns q or k (B, H, T, head_dim) as a block does, in the dtype that stock gives it: that of the products with the tables."""

    def __call__(self, t: Tensor) -> Tensor:
        cos, sin = self.tables()
        a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class FinalLayerForward(ConditionedForward):
    def names_of_linears(self) -> tuple[str, ...]:
        return ("linear",)

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        if not self.serves(x, c):
            return self.stock(x, c)
        module: Any = self.module
        shift, scale = module.adaLN_modulation(c).chunk(2, dim=1)
        norm = module.norm_final
        options: Any = {"norm": kind_of(norm), "weight": norm.weight, "bias": bias_of(norm), "eps": norm.eps}
        return module.linear(mk.adaln(x, shift, scale, **options))


def projections_of(mlp: nn.Module) -> tuple[str, str]:
    return ("w12", "w3") if hasattr(mlp, "w12") else ("fc1", "fc2")


def activation_of(mlp: Any) -> str:
    return "swiglu" if hasattr(mlp, "w12") else {"tanh": "gelu_tanh", "none": "gelu"}[mlp.act.approximate]


def kind_of(norm: nn.Module) -> str | None:
    """RMS norms go by their name: every script has one of its own, and verification compares what it does."""
    if type(norm) is nn.LayerNorm:
        return "layer"
    known = type(norm).__name__ == "RMSNorm" and isinstance(getattr(norm, "eps", None), float) and hasattr(norm, "weight")
    return "rms" if known else None


def bias_of(norm: Any) -> Tensor | None:
    return getattr(norm, "bias", None)


def qk_norm_of(attn: Any) -> dict[str, Any]:
    """The arguments of `mk.dit_block` for the norms of queries and keys; none where there are none."""
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    if q_norm is None or k_norm is None or type(q_norm) is nn.Identity:
        return {}
    return {
        "qk_norm": kind_of(q_norm), "qk_eps": q_norm.eps,
        "q_weight": q_norm.weight, "q_bias": bias_of(q_norm), "k_weight": k_norm.weight, "k_bias": bias_of(k_norm),
    }  # fmt: skip


def is_plain(linear: nn.Module) -> bool:
    """An nn.Linear and nothing made of one: quantised, sharded over devices, parametrised, with LoRA beside it."""
    return type(linear) is nn.Linear and type(linear.weight).__name__ != "DTensor"


def norm_reasons(name: str, norm: Any, dim: int) -> list[str]:
    if kind_of(norm) is None:
        return [f"{name} is a {type(norm).__name__}, not a layer or RMS norm with eps"]
    shape = norm.normalized_shape if type(norm) is nn.LayerNorm else (dim,) if norm.weight is None else tuple(norm.weight.shape)
    return [] if shape == (dim,) else [f"{name} is over {shape}, not over ({dim},)"]


def linear_reasons(module: nn.Module, **shapes: tuple[int, int]) -> list[str]:
    reasons = []
    for name, shape in shapes.items():
        linear: Any = getattr(module, name)
        if not is_plain(linear):
            reasons.append(f"{name} is a {type(linear).__name__}, not a plain nn.Linear")
        elif tuple(linear.weight.shape) != shape:
            reasons.append(f"{name} has shape {tuple(linear.weight.shape)}, expected {shape}")
    return reasons


def idle_reasons(module: nn.Module, *names: str) -> list[str]:
    """Why a part of a module that this rule passes over may do something."""
    reasons = []
    for name in names:
        part: Any = getattr(module, name, None)
        if part is not None and not (type(part) in IDLE and getattr(part, "p", 0) == 0):
            reasons.append(f"{name} is {part}")
    return reasons


class DiTRule(Rule):
    """A module that is called with tokens (B, T, D) and a conditioning (B, C)."""

    parts: tuple[str, ...]
    arguments: tuple[list[str], ...] = (["x", "c"],)  # of forward
    falls_back_when: tuple[str, ...] = (
        "a part of the module has hooks or another forward, or a projection is no nn.Linear any more",
        "x is not (B, T, D), or the conditioning not (B, C)",
        "dtypes are mixed outside of autocast",
        "the device is neither CPU nor CUDA",
    )

    def recognises(self, module: nn.Module) -> bool:
        has_parts = all(isinstance(getattr(module, name, None), nn.Module) for name in (*self.parts, "adaLN_modulation"))
        return has_parts and parameters_of_forward(module) in self.arguments

    def conditioning(self, module: Any) -> nn.Linear | None:
        """The Linear that makes the vectors."""
        last = list(module.adaLN_modulation.modules())[-1]
        return last if type(last) is nn.Linear else None

    def vector_reasons(self, module: Any, dim: int, *counts: int) -> list[str]:
        linear = self.conditioning(module)
        if linear is None or linear.out_features not in [count * dim for count in counts]:
            return [f"adaLN_modulation does not end in a Linear to {' or '.join(map(str, counts))} vectors of {dim}"]
        return []

    def prepare(self, module: nn.Module, draw: Callable[..., Tensor]) -> None:
        """Models begin with vectors, biases and a final layer of zeros: then nothing would be told from nothing."""
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                ones = "norm" in name and name.endswith("weight")  # where a norm's weights are in a model
                parameter.data.copy_(ones + draw(len(parameter)) / 2)
            elif name.startswith("adaLN_modulation") or not parameter.any():
                rows, columns = parameter.shape  # each row is the one before, moved by one: a number for each would take 0.2 s
                parameter.data.copy_(draw(rows + columns - 1).unfold(0, columns, 1) / columns**0.5)

    def magnification(self, module: nn.Module) -> float:
        """A gradient passes ten tensors that stock has rounded, where the tolerances are for two."""
        return 5.0**0.5

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        linear = self.conditioning(module)
        assert linear is not None
        yield (draw(SAMPLES, ROWS // SAMPLES, self.width(module)), draw(SAMPLES, linear.in_features)), {}

    def width(self, module: Any) -> int:
        raise NotImplementedError


class BlockRule(DiTRule):
    """``x + gate * attn(modulate(norm1(x), ...))``, and the same with the MLP."""

    family = "blocks"
    by = "mk.dit_block"
    falls_back_when = (*DiTRule.falls_back_when, "a rotary embedding is given that is not patched too, or for other tokens")
    parts = ("norm1", "attn", "norm2", "mlp")
    arguments = (["x", "c"], ["x", "c", "feat_rope"])
    vanishing = ("attn.k_norm.bias",)  # what is added to all keys adds the same to all logits of a query

    def recognises(self, module: nn.Module) -> bool:
        if not super().recognises(module):
            return False
        attn, mlp = module.attn, module.mlp
        has_attention = all(isinstance(getattr(attn, name, None), nn.Linear) for name in ("qkv", "proj"))
        kinds = (("fc1", "act", "fc2"), ("w12", "w3"))
        return has_attention and any(all(isinstance(getattr(mlp, n, None), nn.Module) for n in names) for names in kinds)

    def reasons_against(self, module: Any) -> list[str]:
        attn, mlp, D = module.attn, module.mlp, module.attn.qkv.weight.shape[-1]
        first, second = projections_of(mlp)
        wide = getattr(mlp, first).weight.shape[0]
        hidden = wide // 2 if first == "w12" else wide
        num_heads = getattr(attn, "num_heads", None)
        reasons = [r for name in ("norm1", "norm2") for r in norm_reasons(name, getattr(module, name), D)]
        reasons += linear_reasons(attn, qkv=(3 * D, D), proj=(D, D))
        reasons += linear_reasons(mlp, **{first: (wide, D), second: (D, hidden)})
        reasons += idle_reasons(attn, "norm", "attn_drop", "proj_drop")
        reasons += idle_reasons(mlp, "norm", "drop", "drop1", "drop2") + idle_reasons(module, "drop_path", "ls1", "ls2")
        if first == "fc1" and type(mlp.act) is not nn.GELU:
            reasons.append(f"mlp.act is a {type(mlp.act).__name__}, not an nn.GELU")
        for one, other, part in (("norm1", "norm2", module), ("q_norm", "k_norm", attn)):
            a, b = getattr(part, one, None), getattr(part, other, None)
            if not reasons and (type(a) is not type(b) or getattr(a, "eps", None) != getattr(b, "eps", None)):
                reasons.append(f"{one} is {a}, {other} {b}")
        if not isinstance(num_heads, int) or num_heads < 1 or D % (8 * num_heads) or D // num_heads > 256:
            heads = "heads of a multiple of 8 channels, up to 256"
            reasons.append(f"attn has num_heads = {num_heads}, which does not split {D} into {heads}")
        elif not reasons and qk_norm_of(attn):
            reasons += [r for name in ("q_norm", "k_norm") for r in norm_reasons(name, getattr(attn, name), D // num_heads)]
        return reasons + self.vector_reasons(module, D, 6, 4)

    def forward(self, module: nn.Module) -> Forward:
        return BlockForward(module) if parameters_of_forward(module) == self.arguments[0] else RotaryBlockForward(module)

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        yield from super().calls(module, draw)
        if parameters_of_forward(module) != self.arguments[0]:
            ((x, c), _) = next(super().calls(module, draw))
            yield (x, c), {"feat_rope": rotation(draw(x.shape[1], x.shape[2] // module.attn.num_heads // 2))}

    def width(self, module: Any) -> int:
        return module.attn.qkv.in_features


class Rotation(nn.Module):
    """An embedding for verification: what a block does with one is compared, and what the script's own does by its own rule."""

    def __init__(self, angles: Tensor):
        super().__init__()
        self.freqs_cos, self.freqs_sin = (table.repeat_interleave(2, -1) for table in (angles.cos(), angles.sin()))


def rotation(angles: Tensor) -> nn.Module:
    rope = Rotation(angles)
    rope.forward = TablesForward(rope)
    return rope


class RotaryRule(Rule):
    """``t * freqs_cos + rotate(t) * freqs_sin`` of channels (2i, 2i + 1), which turn into each other, with tables (T, head_dim)."""

    family = "blocks"
    by = "its tables in mk.dit_block"

    def recognises(self, module: nn.Module) -> bool:
        tables = [getattr(module, name, None) for name in ("freqs_cos", "freqs_sin")]
        return all(isinstance(t, Tensor) and t.dim() == 2 for t in tables) and parameters_of_forward(module) == ["t"]

    def reasons_against(self, module: Any) -> list[str]:
        cos, sin = module.freqs_cos, module.freqs_sin
        if cos.shape != sin.shape or cos.shape[1] % 2 or not len(cos) or cos.dtype not in DTYPES or cos.requires_grad:
            return [f"freqs_cos and freqs_sin are no tables of pairs: {tuple(cos.shape)} and {tuple(sin.shape)}, {cos.dtype}"]
        return []

    def forward(self, module: nn.Module) -> Forward:
        return RotaryForward(module)

    def trial(self, module: nn.Module) -> Forward:
        return TablesForward(module)

    def prepare(self, module: nn.Module, draw: Callable[..., Tensor]) -> None:
        """The angles stay what they are: with others, stock's tables would not have each twice."""

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        yield (draw(SAMPLES, 1, *module.freqs_cos.shape),), {}


class FinalLayerRule(DiTRule):
    """``linear(modulate(norm_final(x), shift, scale))``."""

    family = "modulation"
    by = "mk.adaln"
    parts = ("norm_final", "linear")

    def reasons_against(self, module: Any) -> list[str]:
        if not is_plain(module.linear):
            return [f"linear is a {type(module.linear).__name__}, not a plain nn.Linear"]
        D = module.linear.in_features
        return norm_reasons("norm_final", module.norm_final, D) + self.vector_reasons(module, D, 2)

    def forward(self, module: nn.Module) -> Forward:
        return FinalLayerForward(module)

    def width(self, module: Any) -> int:
        return module.linear.in_features


RULES = (BlockRule(), FinalLayerRule(), RotaryRule())
