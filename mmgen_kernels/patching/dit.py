"""Blocks and final layers of Diffusion Transformers in scripts that follow DiT: DiT, fast-DiT, SiT, REPA and their kin.

Recognised by what they have: the scripts are copied, not installed. What a forward does beyond its parts, verification must tell.
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

    linears: tuple[str, ...]

    def serves(self, x: Any, c: Any) -> bool:
        """Whether the call is the one that verification has seen, and nobody listens to a part of the module."""
        module: Any = self.module
        if not (isinstance(x, Tensor) and isinstance(c, Tensor) and x.dim() == 3 and c.dim() == 2 and x.dtype in DTYPES):
            return False
        linears = [module.get_submodule(name) for name in self.linears]
        if not all(is_plain(linear) for linear in linears) or any(
            has_hooks(child) or "forward" in vars(child) for child in module.modules() if child is not module
        ):
            return False
        # stock promotes mixed dtypes, or refuses them; under autocast the residual keeps x's dtype in stock and here
        same = x.dtype == c.dtype == linears[0].weight.dtype
        return x.device.type in ("cpu", "cuda") and (same or torch.is_autocast_enabled(x.device.type))

    def vectors(self, c: Tensor, count: int) -> tuple[Tensor, ...]:
        module: Any = self.module
        return module.adaLN_modulation(c).chunk(count, dim=1)


class BlockForward(ConditionedForward):
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        if not self.serves(x, c):
            return self.stock(x, c)
        module: Any = self.module
        attn, mlp, first, second = module.attn, module.mlp, module.norm1, module.norm2
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.vectors(c, 6)
        return mk.dit_block(
            x, shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, attn.qkv.weight, attn.qkv.bias,
            attn.proj.weight, attn.proj.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
            num_heads=attn.num_heads, activation=ACTIVATION[mlp.act.approximate], eps=first.eps,
            norm1_weight=first.weight, norm1_bias=first.bias, norm2_weight=second.weight, norm2_bias=second.bias,
        )  # fmt: skip


class FinalLayerForward(ConditionedForward):
    linears = ("linear",)

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        if not self.serves(x, c):
            return self.stock(x, c)
        module: Any = self.module
        shift, scale = self.vectors(c, 2)
        norm = module.norm_final
        return module.linear(mk.adaln(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps))


ACTIVATION = {"tanh": "gelu_tanh", "none": "gelu"}


def is_plain(linear: nn.Module) -> bool:
    """An nn.Linear and nothing made of one: quantised, sharded over devices, parametrised, with LoRA beside it."""
    return type(linear) is nn.Linear and type(linear.weight).__name__ != "DTensor"


def norm_reasons(name: str, norm: Any, dim: int) -> list[str]:
    if type(norm) is not nn.LayerNorm:
        return [f"{name} is a {type(norm).__name__}, not an nn.LayerNorm"]
    return [] if norm.normalized_shape == (dim,) else [f"{name} is over {norm.normalized_shape}, not over ({dim},)"]


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
    falls_back_when: tuple[str, ...] = (
        "a part of the module has hooks or another forward, or a projection is no nn.Linear any more",
        "x is not (B, T, D), or the conditioning not (B, C)",
        "dtypes are mixed outside of autocast",
        "the device is neither CPU nor CUDA",
    )

    def recognises(self, module: nn.Module) -> bool:
        has_parts = all(isinstance(getattr(module, name, None), nn.Module) for name in (*self.parts, "adaLN_modulation"))
        return has_parts and parameters_of_forward(module) == ["x", "c"]

    def conditioning(self, module: Any) -> nn.Linear | None:
        """The Linear that makes the vectors."""
        last = list(module.adaLN_modulation.modules())[-1]
        return last if type(last) is nn.Linear else None

    def vector_reasons(self, module: Any, count: int, dim: int) -> list[str]:
        linear = self.conditioning(module)
        if linear is None or linear.out_features != count * dim:
            return [f"adaLN_modulation does not end in a Linear to {count} vectors of {dim}"]
        return []

    def prepare(self, module: nn.Module, draw: Callable[..., Tensor]) -> None:
        """Models begin with vectors, biases and a final layer of zeros: then nothing would be told from nothing."""
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                ones = name.startswith("norm") and name.endswith("weight")  # where a norm's weights are in a model
                parameter.data.copy_(ones + draw(len(parameter)) / 2)
            elif name.startswith("adaLN_modulation") or not parameter.any():  # of rank 1: a number for each would take 0.2 s
                rows, columns = parameter.shape
                parameter.data.copy_(draw(rows, 1) * draw(columns) / columns**0.5)

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
    parts = ("norm1", "attn", "norm2", "mlp")

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and all(
            isinstance(getattr(part, name, None), nn.Module)
            for part, names in ((module.attn, ("qkv", "proj")), (module.mlp, ("fc1", "act", "fc2")))
            for name in names
        )

    def reasons_against(self, module: Any) -> list[str]:
        attn, mlp, D = module.attn, module.mlp, module.attn.qkv.weight.shape[-1]
        hidden = mlp.fc1.weight.shape[0]
        reasons = [r for name in ("norm1", "norm2") for r in norm_reasons(name, getattr(module, name), D)]
        reasons += linear_reasons(attn, qkv=(3 * D, D), proj=(D, D)) + linear_reasons(mlp, fc1=(hidden, D), fc2=(D, hidden))
        reasons += idle_reasons(attn, "q_norm", "k_norm", "norm", "attn_drop", "proj_drop")
        reasons += idle_reasons(mlp, "norm", "drop", "drop1", "drop2") + idle_reasons(module, "drop_path", "ls1", "ls2")
        if type(mlp.act) is not nn.GELU:
            reasons.append(f"mlp.act is a {type(mlp.act).__name__}, not an nn.GELU")
        if not reasons and module.norm1.eps != module.norm2.eps:
            reasons.append(f"norm1 has eps {module.norm1.eps}, norm2 {module.norm2.eps}")
        num_heads = getattr(attn, "num_heads", None)
        if not isinstance(num_heads, int) or num_heads < 1 or D % (8 * num_heads) or D // num_heads > 256:
            heads = "heads of a multiple of 8 channels, up to 256"
            reasons.append(f"attn has num_heads = {num_heads}, which does not split {D} into {heads}")
        return reasons + self.vector_reasons(module, 6, D)

    def forward(self, module: nn.Module) -> Forward:
        return BlockForward(module)

    def width(self, module: Any) -> int:
        return module.attn.qkv.in_features


class FinalLayerRule(DiTRule):
    """``linear(modulate(norm_final(x), shift, scale))``."""

    family = "modulation"
    by = "mk.adaln"
    parts = ("norm_final", "linear")

    def reasons_against(self, module: Any) -> list[str]:
        if not is_plain(module.linear):
            return [f"linear is a {type(module.linear).__name__}, not a plain nn.Linear"]
        D = module.linear.in_features
        return norm_reasons("norm_final", module.norm_final, D) + self.vector_reasons(module, 2, D)

    def forward(self, module: nn.Module) -> Forward:
        return FinalLayerForward(module)

    def width(self, module: Any) -> int:
        return module.linear.in_features


RULES = (BlockRule(), FinalLayerRule())
