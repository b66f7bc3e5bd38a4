"""What the public functions of the family refuse. Metadata only: a look at a value would stop the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice, check_device, check_dtype, check_floats, check_number
from mmgen_kernels.philox.ops import checked_key
from mmgen_kernels.schedule.reference import INPUTS

FAMILY = "schedule"
MAX_OUTPUTS = 3
PATHS = ("vp", "linear", "gvp", "edm")
TARGETS = ("epsilon", "sample", "v", "flow")


def check_alike(name: str, tensor: Tensor, other: str, than: Tensor) -> None:
    check_floats(name, tensor)
    if tensor.shape != than.shape:
        raise ValueError(f"{name} must have {other}'s shape {tuple(than.shape)}, got {tuple(tensor.shape)}")
    check_device(name, tensor, other, than)


def check_inputs(inputs: Sequence[Tensor]) -> None:
    if not isinstance(inputs, (tuple, list)) or not 1 <= len(inputs) <= INPUTS:
        got = f"{len(inputs)}" if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise TypeError(f"inputs must be a sequence of 1 to {INPUTS} tensors, got {got}")
    check_floats("inputs[0]", inputs[0])
    for i, tensor in enumerate(inputs[1:], 1):
        check_alike(f"inputs[{i}]", tensor, "inputs[0]", inputs[0])


def check_coefficients(coefficients: Tensor, step: int | Tensor, inputs: Sequence[Tensor], learned: bool) -> int:
    """How many outputs there are."""
    if not isinstance(coefficients, Tensor) or coefficients.dtype != torch.float64:
        got = coefficients.dtype if isinstance(coefficients, Tensor) else type(coefficients).__name__
        raise TypeError(f"coefficients must be a float64 tensor, got {got}")
    like, columns, shape = inputs[0], len(inputs) + 2, coefficients.shape
    outputs = shape[1] - 1 - learned if len(shape) == 3 else 0
    if len(shape) != 3 or shape[2] != columns or not 1 <= outputs <= MAX_OUTPUTS or shape[0] < 1:
        rows = "2 + outputs, with a variance" if learned else "1 + outputs"
        raise ValueError(
            f"coefficients must be (steps, {rows}, {columns}) with 1 to {MAX_OUTPUTS} outputs for {len(inputs)} inputs, "
            f"got shape {tuple(shape)}"
        )
    if isinstance(step, Tensor):
        if step.dtype != torch.int64:
            raise TypeError(f"step must be an int or an int64 tensor, got {step.dtype}")
        if tuple(step.shape) not in ((), tuple(like.shape[:1])):
            samples = tuple(like.shape[:1])
            raise ValueError(f"step must be a scalar or one index per sample {samples}, got shape {tuple(step.shape)}")
        check_device("step", step, "inputs[0]", like)
        check_device("coefficients", coefficients, "inputs[0]", like)
    elif not isinstance(step, (int, torch.SymInt)) or isinstance(step, bool):
        raise TypeError(f"step must be an int or an int64 tensor, got {type(step).__name__}")
    elif not 0 <= step < shape[0]:
        raise ValueError(f"step must be in [0, {shape[0]}), got {step}")
    elif not coefficients.is_cpu:
        check_device("coefficients", coefficients, "inputs[0]", like)
    return outputs


def split_noise(
    noise: Tensor | None, like_name: str, like: Tensor, step: int | Tensor = 0
) -> tuple[Tensor | None, Tensor | None]:
    """Noise is a tensor, or the key of one: (noise, key)."""
    if noise is None:
        return None, None
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor or a key, got {type(noise).__name__}")
    if noise.is_floating_point():
        check_alike("noise", noise, like_name, like)
        return noise, None
    key = checked_key(noise)
    if tuple(key.shape) not in ((2,), (*like.shape[:1], 2)):
        raise ValueError(f"noise, where it is a key, must be (2,) or (B, 2) with B = {like.shape[0]}, got {tuple(key.shape)}")
    if key.dim() == 1 and isinstance(step, Tensor) and step.dim() == 1:
        raise ValueError("noise, where it is a key, must be one per sample (B, 2) where step is, got one for all")
    check_device("noise", key, like_name, like)
    return None, key


def check_limits(clamp: float | None, threshold: tuple[float, float] | None) -> None:
    if clamp is not None:
        check_number("clamp", clamp)
        if not clamp > 0:
            raise ValueError(f"clamp must be above 0, got {clamp}")
    if threshold is None:
        return
    if clamp is not None:
        raise ValueError("clamp and threshold are alternatives, got both")
    if not isinstance(threshold, (tuple, list)) or len(threshold) != 2:
        raise TypeError(f"threshold must be (ratio, maximum), got {threshold!r}")
    for number in threshold:
        check_number("threshold", number)
    if not 0 <= threshold[0] <= 1:
        raise ValueError(f"threshold must have a ratio in [0, 1], got {threshold[0]}")


def check_finite(name: str, value: float) -> None:
    check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def check_dtypes(dtypes: Sequence[torch.dtype] | None, outputs: int, like: Tensor) -> list[torch.dtype | None]:
    """One for each output, and None for those that are not there."""
    if dtypes is None:
        dtypes = [like.dtype] * outputs
    if not isinstance(dtypes, (tuple, list)) or len(dtypes) != outputs:
        raise ValueError(f"dtypes must be {outputs} dtypes, one for each output, got {dtypes!r}")
    for dtype in dtypes:
        check_dtype("dtypes", dtype)
    return [*dtypes, *[None] * (MAX_OUTPUTS - outputs)]


def check_times(t: Tensor, table: Tensor | None, x0: Tensor, path: str, target: str) -> None:
    check_choice("path", path, PATHS)
    check_choice("target", target, TARGETS)
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if table is None:
        check_floats("t", t)
    else:
        check_floats("table", table)
        if table.dim() != 1 or table.shape[0] < 1:
            raise ValueError(f"table must be (S,) with S >= 1, got shape {tuple(table.shape)}")
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"t must be int64 or int32 where there is a table, got {t.dtype}")
        check_device("table", table, "x0", x0)
    if tuple(t.shape) != tuple(x0.shape[:1]):
        raise ValueError(f"t must be one time per sample {tuple(x0.shape[:1])}, got shape {tuple(t.shape)}")
    check_device("t", t, "x0", x0)
    if target == "v" and path not in ("vp", "gvp"):
        raise ValueError(f"target 'v' is of paths that keep the variance, vp and gvp, got path {path!r}")
    if target == "flow" and path == "vp" and table is not None:
        raise ValueError("target 'flow' is a derivative by time, which an index into a table has not: give vp a float t")
