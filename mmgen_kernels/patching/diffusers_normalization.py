"""diffusers' normalization layers (models/normalization.py): norm and modulation in one pass.

What makes the vectors (embeddings, SiLU, Linear) is called as stock calls it, so that LoRA, quantised Linears, hooks and
offloading work on. Norm, ``* (1 + scale)`` and ``+ shift`` are one operator, which rounds once, to stock's dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.checks import DTYPES
from mmgen_kernels.patching.rule import ROWS, Call, Forward, Rule, descends_from, has_hooks, overridden, parameters_of_forward

PACKAGE = "diffusers"
FILE = "diffusers.models.normalization"  # other files of the package have classes of the same names
SAMPLES = 2  # in the calls of verification
LAYER_NORMS = ("LayerNorm", "FP32LayerNorm")
RMS_NORMS = ("RMSNorm", "MochiRMSNorm")
HALVES = (torch.float16, torch.bfloat16)


# -- the norm inside --------------------------------------------------------------------------------------------------


def kind_of(norm: nn.Module) -> str | None:
    """Which of the norms it is whose arithmetic is known here; None for any other, and for subclasses."""
    if type(norm) is nn.LayerNorm:
        return "LayerNorm"
    name = type(norm).__name__
    known = type(norm).__module__ == FILE and name in ("FP32LayerNorm", *RMS_NORMS)
    return name if known else None


def is_plain(norm: Any) -> bool:
    """Whether nobody but the norm itself has a say in its results: no hooks and no forward but its own or ours."""
    return not has_hooks(norm) and isinstance(norm.__dict__.get("forward"), (Forward, type(None)))


def fits(norm: Any, x: Tensor) -> bool:
    """Whether the operator computes this norm of x. Stock's dtypes under autocast are known here for CPU and CUDA only."""
    kind = kind_of(norm)
    if kind is None or not is_plain(norm) or x.device.type not in ("cpu", "cuda") or x.dtype not in DTYPES or x.dim() < 2:
        return False
    width = x.shape[-1:]
    if kind in LAYER_NORMS and norm.normalized_shape != width:
        return False
    return norm.weight is None or norm.weight.shape == width


def dtype_of(norm: Any, x: Tensor) -> torch.dtype:
    """Of norm(x), as stock has it."""
    kind = kind_of(norm)
    if kind == "LayerNorm":
        widened = x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and x.dtype in HALVES
        return torch.float32 if widened else x.dtype  # CUDA's autocast computes layer norms in fp32, the CPU's does not
    if kind != "RMSNorm" or norm.weight is None:
        return x.dtype
    weight = norm.weight.dtype
    dtype = weight if weight in HALVES else torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight)
    bias = bias_of(norm)
    return dtype if bias is None else torch.promote_types(dtype, bias.dtype)


def bias_of(norm: Any) -> Tensor | None:
    return getattr(norm, "bias", None)


def normalized(norm: Any, x: Tensor, shift: Any, scale: Any, dtype: torch.dtype) -> Any:
    return mk.adaln(
        x, shift, scale, norm="layer" if kind_of(norm) in LAYER_NORMS else "rms", weight=norm.weight, bias=bias_of(norm),
        eps=norm.eps, dtype=dtype,
    )  # fmt: skip


def modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` with vectors (D,) or (B, 1, D); other shapes broadcast in plain PyTorch, as in stock."""
    if fits(norm, x) and addresses(scale, x):
        dtype = torch.promote_types(dtype_of(norm, x), scale.dtype)  # shift has scale's: they are parts of one tensor
        return normalized(norm, x, shift, scale, dtype)
    return plainly(norm(x), scale, shift)


def modulated_twice(norm: Any, x: Tensor, scales: tuple[Tensor, Tensor], shifts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two outputs of one norm."""
    if fits(norm, x) and addresses(scales[0], x):
        return normalized(norm, x, shifts, scales, torch.promote_types(dtype_of(norm, x), scales[0].dtype))
    n = norm(x)
    return plainly(n, scales[0], shifts[0]), plainly(n, scales[1], shifts[1])


def plainly(n: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    n = n * (1 + scale)
    return n if shift is None else n + shift


def addresses(vector: Tensor, x: Tensor) -> bool:
    """Whether the vector is one for all tokens, or one for each sample of x (B, T, D), and x keeps its shape."""
    if vector.shape[-1] != x.shape[-1]:
        return False
    return vector.dim() == 1 or (vector.dim() == x.dim() == 3 and vector.shape[1] == 1 and vector.shape[0] in (1, x.shape[0]))


# -- forwards ---------------------------------------------------------------------------------------------------------


class ConditionedForward(Forward):
    """Of layers that make their vectors by ``linear(silu(conditioning))``."""

    def vectors(self, conditioning: Tensor, count: int) -> tuple[Tensor, ...]:
        """(B, D) each, views of one projection."""
        module: Any = self.module
        return module.linear(module.silu(conditioning)).chunk(count, dim=1)


class AdaLayerNormForward(Forward):
    def __call__(self, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        module: Any = self.module
        if module.emb is not None:
            temb = module.emb(timestep)
        vectors = module.linear(module.silu(temb))
        if module.chunk_dim == 1:
            shift, scale = vectors.chunk(2, dim=1)  # (B, D)
            return modulated(module.norm, x, scale.unsqueeze(1), shift.unsqueeze(1))
        scale, shift = vectors.chunk(2, dim=0)  # (D,), of a single timestep
        return modulated(module.norm, x, scale, shift)


class AdaLayerNormZeroForward(ConditionedForward):
    def __call__(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Any = None,
    ) -> tuple[Tensor, ...]:
        module: Any = self.module
        if module.emb is not None:
            emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.vectors(emb, 6)
        return modulated(module.norm, x, scale.unsqueeze(1), shift.unsqueeze(1)), *others


class AdaLayerNormZeroSingleForward(ConditionedForward):
    def __call__(self, x: Tensor, emb: Any = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.vectors(emb, 3)
        return modulated(self.module.norm, x, scale.unsqueeze(1), shift.unsqueeze(1)), gate


class SD35AdaLayerNormZeroXForward(ConditionedForward):
    def __call__(self, hidden_states: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        shift, scale, *others, shift_2, scale_2, gate_2 = self.vectors(emb, 9)
        scales, shifts = (scale.unsqueeze(1), scale_2.unsqueeze(1)), (shift.unsqueeze(1), shift_2.unsqueeze(1))
        first, second = modulated_twice(self.module.norm, hidden_states, scales, shifts)
        return first, *others, second, gate_2


class LuminaRMSNormZeroForward(ConditionedForward):
    def __call__(self, x: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        scale, *others = self.vectors(emb, 4)
        return modulated(self.module.norm, x, scale.unsqueeze(1)), *others


class AdaLayerNormContinuousForward(Forward):
    def __call__(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        module: Any = self.module
        scale, shift = module.linear(module.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)  # (B, D)
        return modulated(module.norm, x, scale.unsqueeze(1), shift.unsqueeze(1))


class LuminaLayerNormContinuousForward(Forward):
    def __call__(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        module: Any = self.module
        scale = module.linear_1(module.silu(conditioning_embedding).to(x.dtype))  # (B, D)
        x = modulated(module.norm, x, scale.unsqueeze(1))
        return x if module.linear_2 is None else module.linear_2(x)


class CogVideoXLayerNormZeroForward(ConditionedForward):
    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        vectors = [v.unsqueeze(1) for v in self.vectors(temb, 6)]  # (B, 1, D)
        (shift, scale, gate), (text_shift, text_scale, text_gate) = vectors[:3], vectors[3:]
        norm: Any = self.module.norm
        video, text = modulated(norm, hidden_states, scale, shift), modulated(norm, encoder_hidden_states, text_scale, text_shift)
        return video, text, gate, text_gate


class CogView3PlusForward(ConditionedForward):
    def __call__(self, x: Tensor, context: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        vectors = self.vectors(emb, 12)
        (shift, scale, *others), (text_shift, text_scale, *text_others) = vectors[:6], vectors[6:]
        image = modulated(self.module.norm_x, x, scale.unsqueeze(1), shift.unsqueeze(1))
        text = modulated(self.module.norm_c, context, text_scale.unsqueeze(1), text_shift.unsqueeze(1))
        return image, *others, text, *text_others


class NormForward(Forward):
    """Of a norm without conditioning."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        norm: Any = self.module
        if fits(norm, x) and pays(norm, x):
            # queries and keys come as (B, H, T, D) views of (B, T, H, D): read without a copy and, as by stock, written like x
            swapped = kind_of(norm) in RMS_NORMS and x.dim() == 4 and x.stride(1) < x.stride(2)
            n = normalized(norm, x.transpose(1, 2) if swapped else x, None, None, dtype_of(norm, x))
            return n.transpose(1, 2) if swapped else n
        return self.stock(*args, **kwargs)


def pays(norm: nn.Module, x: Tensor) -> bool:
    """Whether the operator is faster than stock."""
    if kind_of(norm) == "FP32LayerNorm" and x.dtype not in HALVES:
        return False  # PyTorch's own layer norm is one pass, too: only the way to fp32 and back is saved
    return x.stride(-1) == 1  # channels of images (B, C, H, W) would be copied, and the result would lie in another order


# -- rules ------------------------------------------------------------------------------------------------------------


class NormalizationRule(Rule):
    """One class of the file; its forward takes `streams` tensors (B, T, D) and, last, the conditioning (B, C)."""

    family = "modulation"
    by = "mk.adaln"
    falls_back_when: tuple[str, ...] = (
        "the norm inside has hooks or another forward",
        "x is not (B, T, D) with a conditioning vector for each sample",
        "the device is neither CPU nor CUDA",
    )

    def __init__(self, name: str, served_by: type[Forward], *, streams: int = 1, norms: tuple[str, ...] = ("norm",)):
        self.name, self.served_by, self.streams, self.norms = name, served_by, streams, norms

    def recognises(self, module: nn.Module) -> bool:
        return self.base_of(module) is not None

    def base_of(self, module: nn.Module) -> type | None:
        base = descends_from(module, PACKAGE, self.name)
        return base if base is not None and base.__module__ == FILE else None

    def reasons_against(self, module: Any) -> list[str]:
        base = self.base_of(module)
        assert base is not None
        reasons = overridden(module, base, "forward")
        known, found = list(inspect.signature(self.served_by.__call__).parameters)[1:], parameters_of_forward(module)
        if not reasons and found != known:
            reasons.append(f"forward takes {', '.join(found)}, where this rule knows {', '.join(known)}")
        return reasons + [reason for name in self.norms for reason in norm_reasons(name, getattr(module, name, None))]

    def forward(self, module: nn.Module) -> Forward:
        return self.served_by(module)

    def prepare(self, module: nn.Module, draw: Callable[..., Tensor]) -> None:
        """Models begin with a projection of zeros: then no vector would be told from another."""
        for parameter in module.parameters():
            if type(parameter) is nn.Parameter and parameter.dtype in DTYPES:
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                parameter.data.copy_(draw(*parameter.shape) / fan_in**0.5)

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        yield (*self.tokens(module, draw), self.conditioning(module, draw)), {}

    def tokens(self, module: Any, draw: Callable[..., Tensor]) -> list[Tensor]:
        return [draw(SAMPLES, ROWS // SAMPLES, width_of(getattr(module, self.norms[0]))) for _ in range(self.streams)]

    def conditioning(self, module: Any, draw: Callable[..., Tensor]) -> Tensor:
        linear = module.linear_1 if hasattr(module, "linear_1") else module.linear
        return draw(SAMPLES, linear.in_features)


class AdaLayerNormRule(NormalizationRule):
    """One timestep for all samples or, with chunk_dim 1, one for each."""

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        (x,), temb = self.tokens(module, draw), self.conditioning(module, draw)
        several = module.chunk_dim == 1
        if module.emb is not None:
            steps = torch.arange(SAMPLES, device=x.device) % module.emb.num_embeddings
            yield (x, steps if several else steps[-1]), {}
        else:
            yield (x,), {"temb": temb if several else temb[0]}


class AdaLayerNormZeroRule(NormalizationRule):
    """The conditioning is given, or made of timesteps and labels."""

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        (x,), emb = self.tokens(module, draw), self.conditioning(module, draw)
        if module.emb is not None:
            steps = torch.arange(SAMPLES, device=x.device)
            yield (x, steps, torch.zeros_like(steps)), {"hidden_dtype": x.dtype}
        else:
            yield (x,), {"emb": emb}


class NormRule(NormalizationRule):
    """A norm without conditioning."""

    falls_back_when: tuple[str, ...] = ("x has strided channels, or one dimension only", "the device is neither CPU nor CUDA")

    def __init__(self, name: str):
        super().__init__(name, NormForward, norms=())

    def reasons_against(self, module: Any) -> list[str]:
        base = self.base_of(module)
        assert base is not None
        return overridden(module, base, "forward") or norm_reasons("this", module)

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        x = draw(SAMPLES, ROWS // SAMPLES, width_of(module))
        yield (x,), {}
        yield (x.bfloat16(),), {}  # the norms of this file are there for the sake of these


class FP32LayerNormRule(NormRule):
    falls_back_when = ("x is fp32 or fp64, for which PyTorch's layer norm is as fast", *NormRule.falls_back_when)


def norm_reasons(name: str, norm: Any) -> list[str]:
    """Why the norm inside is not one that the operator computes."""
    if not isinstance(norm, nn.Module) or kind_of(norm) is None:
        return [f"{name} is a {type(norm).__name__}, not one of {', '.join((*LAYER_NORMS, *RMS_NORMS))}"]
    if len(shape_of(norm)) != 1:
        return [f"{name} normalizes {len(shape_of(norm))} dimensions"]
    return []


def shape_of(norm: Any) -> tuple[int, ...]:
    return tuple(norm.normalized_shape if kind_of(norm) in LAYER_NORMS else norm.dim)


def width_of(norm: Any) -> int:
    return shape_of(norm)[0]


RULES: tuple[Rule, ...] = (
    AdaLayerNormRule("AdaLayerNorm", AdaLayerNormForward),
    AdaLayerNormZeroRule("AdaLayerNormZero", AdaLayerNormZeroForward),
    NormalizationRule("AdaLayerNormZeroSingle", AdaLayerNormZeroSingleForward),
    NormalizationRule("SD35AdaLayerNormZeroX", SD35AdaLayerNormZeroXForward),
    NormalizationRule("LuminaRMSNormZero", LuminaRMSNormZeroForward),
    NormalizationRule("AdaLayerNormContinuous", AdaLayerNormContinuousForward),
    NormalizationRule("LuminaLayerNormContinuous", LuminaLayerNormContinuousForward),
    NormalizationRule("CogVideoXLayerNormZero", CogVideoXLayerNormZeroForward, streams=2),
    NormalizationRule("CogView3PlusAdaLayerNormZeroTextImage", CogView3PlusForward, streams=2, norms=("norm_x", "norm_c")),
    FP32LayerNormRule("FP32LayerNorm"),
    NormRule("RMSNorm"),
    NormRule("MochiRMSNorm"),
)
