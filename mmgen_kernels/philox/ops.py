"""The public functions of the family: what they compute, what they check, their schemas and fakes.

Every function that draws numbers is a pure function of (shape, key): no state, no order of calls, no device, batch, thread
count or launch shape in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_dtype
from mmgen_kernels.philox import reference

FAMILY = "philox"
KEY_DTYPES = (torch.int64, torch.uint64)


def philox_normal(
    shape: Sequence[int],
    key: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise from a key: the same numbers wherever, whenever and in whatever batch it is drawn.

    With w the integers of `philox_integers`, u = (w[i] + 1/2) / 2^32 and v = (w[i + 1] + 1/2) / 2^32 for even i (Box-Muller):
    ``z[i] = sqrt(-2 ln u) cos(2 pi v)``, ``z[i + 1] = sqrt(-2 ln u) sin(2 pi v)``. So 1e-14 < |z| < 6.77.

    The integers are the same bits from every implementation. fp32 normals are within 6 units in the last place of the formula,
    and the same bits from every instruction set of the C++ kernel; bf16 and fp16 are fp32 normals rounded once; fp64 normals are
    the same numbers, evaluated in fp64.

    Args:
        shape: of the result. With one key per sample, it begins with the key's leading sizes.
        key: (seed, offset), int64 (2,) or (*batch, 2), read as uint64 (which is taken too); element i of a sample is element
            i of its key's stream. None draws a key from torch's generator.
        dtype: float64, float32, bfloat16 or float16.
        device: of the result; by default the key's. A key on the CPU is copied there.

    Returns:
        Contiguous tensor of `shape`. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: never; every key is valid.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011; Box and Muller 1958.
    """
    key, shape = checked(shape, key, device)
    check_dtype("dtype", dtype)
    return PHILOX_NORMAL(backends.choose(PHILOX_NORMAL, FAMILY, key.device.type), key, shape, dtype)


def philox_uniform(
    shape: Sequence[int],
    key: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform noise in [0, 1) from a key.

    ``u[i] = w[i] / 2^32`` with the integers w of `philox_integers`, cut off (not rounded: 1 never comes) after 24 binary digits
    in fp32, 11 in fp16, 8 in bf16. The same bits from every implementation.

    Args:
        shape, key, dtype, device: as in `philox_normal`.

    Returns:
        Contiguous tensor of `shape`. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: never; every key is valid.

    Source: Salmon et al. 2011.
    """
    key, shape = checked(shape, key, device)
    check_dtype("dtype", dtype)
    return PHILOX_UNIFORM(backends.choose(PHILOX_UNIFORM, FAMILY, key.device.type), key, shape, dtype)


def philox_integers(shape: Sequence[int], key: Tensor | None, *, device: torch.device | str | None = None) -> Tensor:
    """The integer stream itself, uniform in [0, 2^32).

    Element i of a sample is word i % 4 of Philox 4x32-10 with the 64-bit key `seed` and the 128-bit counter
    (offset + i // 4) mod 2^64. The same bits from every implementation.

    Args:
        shape, key, device: as in `philox_normal`.

    Returns:
        int64, contiguous, of `shape`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: there is none.

    Source: Salmon et al. 2011; the layout is that of torch.func._random.
    """
    key, shape = checked(shape, key, device)
    return PHILOX_INTEGERS(backends.choose(PHILOX_INTEGERS, FAMILY, key.device.type), key, shape)


def fold_in(key: Tensor, i: int | Tensor) -> Tensor:
    """A new key for step, layer or sample i: ``(w0 + 2^32 w1, w2 + 2^32 w3)`` of the block offset + i of the key's stream.

    i may be a tensor on the key's device, such as a step counter that a captured graph advances. ``fold_in(key,
    torch.arange(B))`` gives B samples their keys. Draw from a key or fold it, not both: they would read the same blocks.

    Args:
        key: int64 or uint64 (*batch, 2).
        i: an int, -2^63 <= i < 2^63, or an int64 tensor that broadcasts with the key's batch; negative values count as
            uint64.

    Returns:
        int64 (..., 2).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values of tensors never raise.

    NaN: there is none.

    Source: torch.func._random.fold_in, whose keys these are bit for bit.
    """
    key = checked_key(key)
    if isinstance(i, Tensor):
        if i.dtype != torch.int64:
            raise TypeError(f"i must be an int or an int64 tensor, got {i.dtype}")
        if i.device != key.device:
            raise ValueError(f"i must be on key's device {key.device}, got {i.device}")
    elif isinstance(i, (int, torch.SymInt)) and not isinstance(i, bool):
        if not -(2**63) <= i < 2**63:
            raise ValueError(f"i must be at least -2^63 and below 2^63, got {i}")
        i = torch.full((), i, dtype=torch.int64, device=key.device)
    else:
        raise TypeError(f"i must be an int or an int64 tensor, got {type(i).__name__}")
    try:
        batch = torch.broadcast_shapes(key.shape[:-1], i.shape)
    except RuntimeError:
        raise ValueError(f"i must broadcast with key's batch {tuple(key.shape[:-1])}, got {tuple(i.shape)}") from None
    return FOLD_IN(backends.choose(FOLD_IN, FAMILY, key.device.type), key.expand(*batch, 2), i.expand(batch))


def checked(shape: Sequence[int], key: Tensor | None, device: torch.device | str | None) -> tuple[Tensor, list[int]]:
    """The key as int64 on the device where the numbers are wanted, and the shape as a list."""
    if not isinstance(shape, (tuple, list)) or not all(isinstance(s, (int, torch.SymInt)) for s in shape):
        raise TypeError(f"shape must be a tuple of ints, got {shape!r}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must have sizes >= 0, got {tuple(shape)}")
    if key is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), device=device), list(shape)
    key = checked_key(key)
    if tuple(shape[: key.dim() - 1]) != tuple(key.shape[:-1]):
        raise ValueError(f"shape must begin with key's leading sizes {tuple(key.shape[:-1])}, got {tuple(shape)}")
    if device is not None and torch.device(device) != key.device:
        wanted = torch.device(device)
        if wanted.type == key.device.type and wanted.index is None:  # "cuda" for a key on cuda:0
            return key, list(shape)
        if key.device.type != "cpu":  # fetching it would wait for the device
            raise ValueError(f"key must be on {wanted} or on the CPU, got {key.device}")
        key = key.to(wanted, non_blocking=True)
    return key, list(shape)


def checked_key(key: Tensor) -> Tensor:
    """Metadata only: a look at a value would stop the GPU."""
    if not isinstance(key, Tensor):
        raise TypeError(f"key must be a tensor, got {type(key).__name__}")
    if key.dtype not in KEY_DTYPES:
        raise TypeError(f"key must be int64 or uint64, got {key.dtype}")
    if key.dim() < 1 or key.shape[-1] != 2:
        raise ValueError(f"key must be (2,) or (*batch, 2), got shape {tuple(key.shape)}")
    return key.view(torch.int64) if key.dtype == torch.uint64 else key


# -- registration -----------------------------------------------------------------------------------------------------


def stream_vmap(call, info, in_dims, key, shape, *dtype):
    """A batch of keys is one key per sample."""
    return call(key.movedim(in_dims[0], 0), [info.batch_size, *shape], *dtype), 0


def fold_in_vmap(call, info, in_dims, key, i):
    key, i = (a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0) for a, d in zip((key, i), in_dims, strict=True))
    return call(key, i), 0


def launchers(function):
    return {name: f"mmgen_kernels.philox.{module}:{function}" for name, module in (("cuda", "cuda"), ("triton", "triton_kernels"))}


PHILOX_INTEGERS = library.define(
    "philox_integers(Tensor key, SymInt[] shape) -> Tensor integers",
    reference=reference.philox_integers,
    fake=lambda key, shape: key.new_empty(shape),
    launchers=launchers("philox_integers"),
    vmap=stream_vmap,
)

PHILOX_UNIFORM = library.define(
    "philox_uniform(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor noise",
    reference=reference.philox_uniform,
    fake=lambda key, shape, dtype: key.new_empty(shape, dtype=dtype),
    launchers=launchers("philox_uniform"),
    vmap=stream_vmap,
)

PHILOX_NORMAL = library.define(
    "philox_normal(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor noise",
    reference=reference.philox_normal,
    fake=lambda key, shape, dtype: key.new_empty(shape, dtype=dtype),
    launchers=launchers("philox_normal"),
    vmap=stream_vmap,
)

FOLD_IN = library.define(
    "fold_in(Tensor key, Tensor i) -> Tensor folded",
    reference=reference.fold_in,
    fake=lambda key, i: key.new_empty(key.shape),
    launchers=launchers("fold_in"),
    vmap=fold_in_vmap,
)
