"""Inputs of the family: values, addresses and layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgen_kernels.battery.draws import rand, randint, randn
from mmgen_kernels.battery.modulation.law import VECTORS, Tensors

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# dtypes of x, y and all else; of one alone, of everything
SAME = ((FP64,), (FP32,), (BF16,), (FP16,))
FEW = ((FP32,), (BF16,))
MIXED = (
    (BF16, BF16, FP32),  # Wan: fp32 modulation of bf16 activations
    (FP16, FP16, FP32),
    (FP32, BF16, BF16),  # a residual stream in fp32
    (FP32, BF16, FP32),
    (BF16, FP32, FP16),
    (FP64, FP32, FP32),
)
ROWS = 5  # of the matrix that `rows` points into
ADDRESSES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "shared": lambda B, T: (),
    "sample": lambda B, T: (B,),
    "frame": lambda B, T: (B, next(frames for frames in (3, 2, 1) if T % frames == 0)),
    "token": lambda B, T: (B, T),
    "rows": lambda B, T: (ROWS,),
}

# -- values -----------------------------------------------------------------------------------------------------------
# Makers of x and y, (B, T, D) in fp64, given the dtype of x.


def gaussian(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=1), randn(*shape, seed=2)


def offset(shape, dtype):
    """mean / deviation = 1000."""
    return tuple(v + 1000 for v in gaussian(shape, dtype))


def constant(shape, dtype):
    """Rows without variance, and their updates too."""
    return tuple((10 ** (3 * rand(*shape[:-1], 1, seed=s))).expand(shape).clone() for s in (3, 4))


def tiny(shape, dtype):
    return tuple(v * (1e-7 if dtype == FP16 else 1e-20) for v in gaussian(shape, dtype))


def huge(shape, dtype):
    """fp16: as large as it goes."""
    if dtype == FP16:
        return 65000 * (2 * rand(*shape, seed=1) - 1), gaussian(shape, dtype)[1]
    return tuple(v * 1e18 for v in gaussian(shape, dtype))


def not_finite(value: float) -> Callable:
    def make(shape, dtype):
        x, y = gaussian(shape, dtype)
        x[1, 2, 3] = value
        x[2, -1, -1] = -value
        return x, y

    return make


def not_finite_y(shape, dtype):
    x, y = gaussian(shape, dtype)
    y[0, 1, 0], y[2, 3, 5] = torch.nan, torch.inf
    return x, y


# -- inputs -----------------------------------------------------------------------------------------------------------


def inputs(
    names: str,
    shape: tuple[int, ...] = (3, 30, 136),
    address: str = "sample",
    values: Callable = gaussian,
    layout: Callable[[Tensors], Tensors] = lambda t: t,
    index: torch.dtype = torch.int32,
) -> Callable[[torch.device, Any], Tensors]:
    """The tensors called `names`, vectors by the kinds of `address` in turn, rearranged by `layout` on the device."""

    def make(device: torch.device, dtypes: Any) -> Tensors:
        dtype_x, dtype_y, dtype_v = dtypes if len(dtypes) == 3 else dtypes * 3
        B, T, D = shape[0], int(torch.Size(shape[1:-1]).numel()), shape[-1]
        kinds, wanted = address.split(), names.split()
        x, y = values(shape, dtype_x)
        t = {"x": x.to(dtype_x)} | ({"y": y.to(dtype_y)} if "y" in wanted else {})
        given = [name for name in VECTORS if name in wanted]
        for i, name in enumerate(given):
            vector = randn(*ADDRESSES[kinds[i % len(kinds)]](B, T), D, seed=70 + VECTORS.index(name))
            t[name] = (0.5 * vector).to(dtype_v)
        for i, name in enumerate(n for n in ("weight", "bias", "post_weight") if n in wanted):
            t[name] = ((name != "bias") + 0.25 * randn(D, seed=20 + i)).to(dtype_v)
        if "table" in wanted:
            t["table"] = (0.25 * randn(len(given), D, seed=30)).to(dtype_v)
        if "rows" in kinds:
            t["rows"] = out_of_order(shape[:-1]).to(index)
        return layout({name: v.to(device) for name, v in t.items()})

    return make


def out_of_order(shape: tuple[int, ...]) -> Tensor:
    """Unsorted; row 2 is never used, and some are out of range on either side."""
    rows = randint(-2, ROWS + 3, shape, seed=40)
    return torch.where(rows == 2, 2**31 - 1, rows)


# -- layouts ----------------------------------------------------------------------------------------------------------


def chunks(count: int) -> Callable[[Tensors], Tensors]:
    """Vectors (B, D) as views of one (B, count * D), as `chunk(count, dim=1)` makes them."""

    def change(t: Tensors) -> Tensors:
        given = [name for name in VECTORS if name in t]
        whole = torch.cat([t[name] for name in given] + [torch.full_like(t[given[0]], torch.nan)] * (count - len(given)), 1)
        return t | dict(zip(given, whole.chunk(count, 1)[: len(given)], strict=True))

    return change


def chunks_of_tokens(t: Tensors) -> Tensors:
    """Vectors (B, T, D) as views of one (B, T, V, D), as Wan's `temb` of every token."""
    given = [name for name in VECTORS if name in t]
    whole = torch.stack([t[name] for name in given], 2)
    return t | {name: whole[:, :, i] for i, name in enumerate(given)}


def activations(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: change(v) if name in ("x", "y") else v for name, v in t.items()}


def everything(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: v if name == "rows" else change(v) for name, v in t.items()}


def strided_last(v: Tensor) -> Tensor:
    """The last dimension is not contiguous."""
    return torch.stack((v, torch.full_like(v, torch.nan)), -1)[..., 0]


def unaligned(v: Tensor) -> Tensor:
    """It begins one element behind an aligned address."""
    return F.pad(v.flatten(), (1, 0))[1:].view(v.shape)


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "tokens_outermost": activations(lambda v: v.transpose(0, 1).contiguous().transpose(0, 1)),
    "channels_first": activations(lambda v: v.mT.contiguous().mT),
    "slices": activations(lambda v: F.pad(v, (8, 5, 2, 1), value=torch.nan)[:, 2:-1, 8:-5]),
    "expanded_tokens": activations(lambda v: v[:, :1].expand(v.shape)),
    "strided_last": everything(strided_last),
    "unaligned": everything(unaligned),
}
