"""What the public functions of the family refuse. Metadata only: a look at a value would stop the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels.checks import DTYPES, check_choice, check_device, check_dtype, check_floats, check_integers, check_number
from mmgen_kernels.philox.ops import checked_key
from mmgen_kernels.schedule.reference import COLUMNS, INPUTS

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
    first = inputs[0]
    check_floats("inputs[0]", first)
    shape, device = first.shape, first.device
    for i, tensor in enumerate(inputs[1:], 1):  # each alike at one glance, or check_alike says what is not
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype not in DTYPES or tensor.device != device:
            check_alike(f"inputs[{i}]", tensor, "inputs[0]", first)


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
    check_step("coefficients", coefficients, step, "inputs[0]", like)
    return outputs


def check_step(name: str, table: Tensor, step: int | Tensor, like_name: str, like: Tensor) -> None:
    """A row of a table: on the host, or an index, or one for each sample, which with the table is where `like` is."""
    if isinstance(step, Tensor):
        if step.dtype != torch.int64:
            raise TypeError(f"step must be an int or an int64 tensor, got {step.dtype}")
        if tuple(step.shape) not in ((), tuple(like.shape[:1])):
            samples = tuple(like.shape[:1])
            raise ValueError(f"step must be a scalar or one index per sample {samples}, got shape {tuple(step.shape)}")
        check_device("step", step, like_name, like)
        check_device(name, table, like_name, like)
    elif not isinstance(step, (int, torch.SymInt)) or isinstance(step, bool):
        raise TypeError(f"step must be an int or an int64 tensor, got {type(step).__name__}")
    elif not 0 <= step < len(table):
        raise ValueError(f"step must be in [0, {len(table)}), got {step}")
    elif not table.is_cpu:
        check_device(name, table, like_name, like)


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
    if not 0 < threshold[1] < math.inf:
        raise ValueError(f"threshold must have a maximum above 0, got {threshold[1]}")


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


def check_positive(name: str, value: float) -> None:
    check_finite(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_of_samples(name: str, values: Tensor, like: Tensor, like_name: str = "output") -> Tensor:
    """A float per sample, as (B,)."""
    check_floats(name, values)
    shape, B = tuple(values.shape), like.shape[0]
    if not shape or shape[0] != B or any(n != 1 for n in shape[1:]):
        raise ValueError(f"{name} must be ({B},) or ({B}, 1, ...), a number per sample, got shape {shape}")
    check_device(name, values, like_name, like)
    return values if len(shape) == 1 else values.reshape(B)


def check_mask(mask: Tensor, like: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dim() != like.dim() or any(n not in (1, of) for n, of in zip(mask.shape, like.shape, strict=True)):
        shapes = f"{tuple(mask.shape)} for {tuple(like.shape)}"
        raise ValueError(f"mask must have output's dimensions, each of output's size or 1, got shape {shapes}")
    check_device("mask", mask, "output", like)


def check_hybrid(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> None:
    check_floats("x0", x0)
    if x0.dim() < 2:
        raise ValueError(f"x0 must be (B, C, ...), got shape {tuple(x0.shape)}")
    check_alike("noise", noise, "x0", x0)
    B, C, *rest = x0.shape
    if tuple(output.shape) not in ((B, 2 * C, *rest), (B, C, *rest)):
        sizes = ", ".join(map(str, rest))
        raise ValueError(
            f"output must be ({B}, {2 * C}, {sizes}), a prediction and a variance, or ({B}, {C}, {sizes}), for x0 of shape "
            f"{tuple(x0.shape)}, got shape {tuple(output.shape)}"
        )
    check_device("output", output, "x0", x0)
    for name, tensor in (("x0", x0), ("noise", noise)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} has no derivative here: detach it, or take diffusion_loss of the target")
    check_integers("t", t, "x0", x0)
    if tuple(t.shape) != (B,):
        raise ValueError(f"t must be one timestep per sample ({B},), got shape {tuple(t.shape)}")
    if not isinstance(table, Tensor) or table.dtype != torch.float64:
        raise TypeError(f"table must be a float64 tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != COLUMNS:
        raise ValueError(f"table must be (T, {COLUMNS}) with T >= 1, as hybrid_table makes it, got shape {tuple(table.shape)}")
    check_device("table", table, "x0", x0)
