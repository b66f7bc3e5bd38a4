"""What the public functions of the family refuse, and how they see their arguments. Metadata only: a look at a value would stop
the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgen_kernels.checks import check_device, check_dtype, check_floats

if TYPE_CHECKING:
    from mmgen_kernels.modulation.ops import Vector

FAMILY = "modulation"
MAX_ROWS = 4096


def check_x(x: Tensor) -> None:
    check_floats("x", x)
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"x must be (B, T, D), (N, D) or (B, ..., D) with D >= 1, got shape {tuple(x.shape)}")


def check_y(y: Tensor, x: Tensor) -> None:
    check_floats("y", y)
    if y.shape != x.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    check_device("y", y, "x", x)


def as_tokens(x: Tensor, rows: Tensor | None) -> Tensor:
    """x as (B, T, D). (N, D) is N samples of one token or, with rows, one packed sample of N tokens."""
    if x.dim() == 3:
        return x
    if x.dim() == 2:
        return x.unsqueeze(1) if rows is None else x.unsqueeze(0)
    return x.flatten(1, -2)


def one_or_two(shift: Vector, scale: Vector) -> tuple[bool, dict[str, Tensor | None]]:
    """Whether sequences were given, and the vectors by the names that the operators have for them."""
    sequences = [not (v is None or isinstance(v, Tensor)) for v in (shift, scale)]
    if not any(sequences):
        return False, {"shift": shift, "scale": scale, "shift_2": None, "scale_2": None}  # type: ignore[dict-item]
    if not all(s or v is None for s, v in zip(sequences, (shift, scale), strict=True)):
        raise TypeError("shift and scale must both be sequences of two vectors, or both be one vector")
    (a, c), (b, d) = (sequence_of_two(name, v) for name, v in (("shift", shift), ("scale", scale)))
    if c is None and d is None:
        raise ValueError("the second output needs a shift or a scale: both are None")
    return True, {"shift": a, "scale": b, "shift_2": c, "scale_2": d}


def sequence_of_two(name: str, vectors: Vector) -> Sequence[Tensor | None]:
    if vectors is None:
        return None, None
    if not isinstance(vectors, (tuple, list)):
        raise TypeError(f"{name} must be a tensor, None or a sequence of two, got {type(vectors).__name__}")
    if len(vectors) != 2:
        raise ValueError(f"{name} must hold two vectors, got {len(vectors)}")
    return vectors


def addressed(vectors: dict[str, Tensor | None], tokens: Tensor, x: Tensor, rows: Tensor | None) -> list[Tensor | None]:
    """Each vector as (D,), (B, D) or (B, F, D); with rows (R, D) or (D,)."""
    found = []
    for name, vector in vectors.items():
        if vector is not None:
            check_floats(name, vector)
            check_device(name, vector, "x", x)
            vector = by_row(name, vector, tokens) if rows is not None else by_place(name, vector, tokens, x)
        found.append(vector)
    return found


def by_row(name: str, vector: Tensor, tokens: Tensor) -> Tensor:
    if vector.dim() not in (1, 2) or vector.shape[-1] != tokens.shape[-1]:
        raise ValueError(f"{name} must be (R, {tokens.shape[-1]}) or ({tokens.shape[-1]},) with rows, got {tuple(vector.shape)}")
    if vector.dim() == 2 and not 1 <= vector.shape[0] <= MAX_ROWS:
        raise ValueError(f"{name} must have 1 to {MAX_ROWS} rows, got {vector.shape[0]}")
    return vector


def by_place(name: str, vector: Tensor, tokens: Tensor, x: Tensor) -> Tensor:
    B, T, D = tokens.shape
    if vector.dim() == 0 or vector.shape[-1] != D:
        raise ValueError(f"{name} must have D = {D} as its last size, got shape {tuple(vector.shape)}")
    if vector.dim() == 1:
        return vector
    fits = vector.dim() <= 3 or starts_as(vector, x)
    if vector.dim() > 3:  # (B, F, 1, D), or one of x's own leading shape
        vector = vector.flatten(1, -2)
    samples, frames = vector.shape[0], 1 if vector.dim() == 2 else vector.shape[1]
    # not `samples in (1, B)`: with symbolic sizes Dynamo has said no to that where they are equal (Latte's blocks, torch 2.13)
    if fits and (samples == 1 or samples == B) and (frames == T or (frames > 0 and T % frames == 0)):
        if samples == B:
            return vector
        return vector.reshape(D) if frames == 1 else vector.expand(B, -1, -1)
    raise ValueError(
        f"{name} must be ({D},), ({B}, {D}) or ({B}, F, {D}) where F divides T = {T}, got shape {tuple(vector.shape)}"
    )


def starts_as(vector: Tensor, x: Tensor) -> bool:
    """Whether flattened it means what its shape says: beside x (B, H, W, D), (B, 1, W, D) is not W spans of H tokens."""
    sizes = list(vector.shape[1:-1])
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return x.dim() <= 3 or sizes == list(x.shape[1:-1])[: len(sizes)]


def check_affine(tokens: Tensor, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if parameter is not None:
            check_floats(name, parameter)
            if parameter.shape != tokens.shape[-1:]:
                raise ValueError(f"{name} must be ({tokens.shape[-1]},), got shape {tuple(parameter.shape)}")
            check_device(name, parameter, "x", tokens)


def check_table(table: Tensor | None, vectors: list[Tensor | None], tokens: Tensor) -> None:
    if table is None:
        return
    check_floats("table", table)
    expected = (sum(v is not None for v in vectors), tokens.shape[-1])
    if expected[0] == 0:
        raise ValueError("table needs a vector that it is added to, got none")
    if tuple(table.shape) != expected:
        raise ValueError(f"table must have a row for each vector given, {expected}, got shape {tuple(table.shape)}")
    check_device("table", table, "x", tokens)


def check_rows(rows: Tensor | None, tokens: Tensor, x: Tensor) -> Tensor | None:
    """(B, T)."""
    if rows is None:
        return None
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows must be int32 or int64, got {getattr(rows, 'dtype', type(rows).__name__)}")
    if rows.shape != x.shape[:-1]:
        raise ValueError(f"rows must have x's leading shape {tuple(x.shape[:-1])}, got {tuple(rows.shape)}")
    check_device("rows", rows, "x", x)
    return rows.reshape(tokens.shape[:-1])


def output_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Of the modulated output."""
    if dtype is not None:
        check_dtype("dtype", dtype)
        return dtype
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):  # meta has no autocast to ask for
        return x.dtype
    return torch.get_autocast_dtype(kind)
