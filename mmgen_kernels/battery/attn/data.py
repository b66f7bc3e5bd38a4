"""Inputs of the family: values, layouts, masks and packed batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmgen_kernels.battery.attn.law import Tensors
from mmgen_kernels.battery.draws import randn

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SAME = ((FP64,), (FP32,), (BF16,), (FP16,))
FEW = ((FP32,), (BF16,))


@dataclass(frozen=True)
class Inputs:
    """Called with a device and dtypes (of q, k and v; of bias), it makes the arguments of `attention` by name.

    `bias` names the sizes that are not broadcast, of "bhts". `bounds_q` and `bounds_k` make a packed batch of T and S tokens.
    """

    T: int = 40
    S: int = 51
    D: int = 72
    B: int = 3
    H: int = 4
    G: int = 4
    bias: str | None = None
    key_lengths: tuple[int, ...] | None = None
    bounds_q: tuple[int, ...] | None = None
    bounds_k: tuple[int, ...] | None = None
    integers: torch.dtype = torch.int32
    layout: Callable[[Tensor], Tensor] = lambda t: t
    values: Callable[[Tensors], Tensors] = lambda t: t

    def __call__(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Tensors:
        dtype, bias_dtype = dtypes[0], dtypes[-1]
        B = 1 if self.bounds_q else self.B
        shapes = {"q": (B, self.T, self.H, self.D), "k": (B, self.S, self.G, self.D), "v": (B, self.S, self.G, self.D)}
        t = {name: randn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        if self.bias is not None:
            full = dict(zip("bhts", (B, self.H, self.T, self.S), strict=True))
            t["bias"] = randn(*(size if axis in self.bias else 1 for axis, size in full.items()), seed=9)
        t = {name: v.to(bias_dtype if name == "bias" else dtype) for name, v in self.values(t).items()}
        t = {name: (v if name == "bias" else self.layout(v)).to(device) for name, v in t.items()}
        if self.bounds_q:
            t = {name: v[0] for name, v in t.items()}
        bounds = {"key_lengths": self.key_lengths, "cu_seqlens_q": self.bounds_q, "cu_seqlens_k": self.bounds_k}
        return t | {name: torch.tensor(v, dtype=self.integers, device=device) for name, v in bounds.items() if v is not None}

    def but(self, **changed) -> Inputs:
        return replace(self, **changed)


# -- layouts of q, k and v, (B, T, H, D) with D contiguous ----------------------------------------------------------------


def heads_first(t: Tensor) -> Tensor:
    """A view of (B, H, T, D), as who calls SDPA has it."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def projection(t: Tensor) -> Tensor:
    """The middle third of a packed projection (B, T, 3, H, D); what lies around it is NaN."""
    wide = t.new_full((t.shape[0], t.shape[1], 3, *t.shape[2:]), torch.nan)
    wide[:, :, 1] = t
    return wide[:, :, 1]


def every_other_token(t: Tensor) -> Tensor:
    wide = t.new_full((t.shape[0], 2 * t.shape[1], *t.shape[2:]), torch.nan)
    wide[:, ::2] = t
    return wide[:, ::2]


def tokens_expanded(t: Tensor) -> Tensor:
    """Every sample is the first one, at stride 0."""
    return t[:1].expand(t.shape)


LAYOUTS = {f.__name__: f for f in (heads_first, projection, every_other_token, tokens_expanded)}

# -- values ---------------------------------------------------------------------------------------------------------------


def steep(t: Tensors) -> Tensors:
    """Logits of 1e4 to 1e5, either sign, 32 or more apart: every weight but one is 0.

    With a scale of 1/8 they are exact in fp32 in any order of sums. Were they nearer, an lse kept in fp32 would have no digits
    left for the difference.
    """
    q, k = 64 * (2 * t["q"]).round(), 256 * (2 * t["k"]).round()
    q[..., 0], k[..., 0] = 1, 256 * torch.arange(k.shape[1]).unsqueeze(-1)
    return t | {"q": q, "k": k}


def equal(t: Tensors) -> Tensors:
    return t | {"q": torch.zeros_like(t["q"])}


def masked_bias(t: Tensors) -> Tensors:
    """-inf here and there, and on every key of the first query."""
    bias = torch.where(t["bias"] > 0.5, -torch.inf, t["bias"])
    bias[:, :, 0] = -torch.inf
    return t | {"bias": bias}


def padding_of_nan(lengths: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    def change(t: Tensors) -> Tensors:
        t = {name: v.clone() for name, v in t.items()}
        for b, length in enumerate(lengths):
            t["k"][b, max(length, 0) :] = t["v"][b, max(length, 0) :] = torch.nan
        return t

    return change


def spoiled(value: float) -> Callable[[Tensors], Tensors]:
    """One query of sample 0 and one value of sample 1."""

    def change(t: Tensors) -> Tensors:
        t = {name: v.clone() for name, v in t.items()}
        t["q"][0, 3, 1, 2] = t["v"][1, 5, 0, 1] = value
        return t

    return change
