"""What trains a codebook: codes of indices, sums by code, their moving averages, dead codes, k-means."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmgen_kernels import backends, library
from mmgen_kernels.checks import check_choice, check_device, check_floats, check_number
from mmgen_kernels.vq import reference
from mmgen_kernels.vq.ops.checks import (
    FAMILY,
    MAX_CODES,
    check_codebook,
    check_indices,
    check_key,
    check_mask,
)
from mmgen_kernels.vq.ops.lookup import nearest_code

TRITON = "mmgen_kernels.vq.triton_kernels"
SUM_DTYPES = (torch.float64, torch.float32)


class CodeStatistics(NamedTuple):
    """What `code_statistics` returns."""

    counts: Tensor  # (K,) or (H, K), int64
    sums: Tensor  # (K, D) or (H, K, D)


class KMeansOutput(NamedTuple):
    """What `kmeans` returns."""

    codebook: Tensor  # (K, D) or (H, K, D)
    counts: Tensor  # (K,) or (H, K), int64: the rows whose mean a code is; 0 where a code kept its place


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes of indices, with a gradient to the codebook that is the same in every run.

    ``codes[n] = codebook[indices[n]]``, and 0 where the index is below 0; an index past the end means the last code. The gradient
    of a code is the sum over its rows in fp64 and in row order.

    Args:
        codebook: (K, D), or (H, K, D) for H heads; fp64, fp32, bf16 or fp16; any strides.
        indices: int64 (...), or (H, ...).

    Returns:
        (..., D) of the codebook's dtype. Differentiable once, in the codebook.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: copied like any other value.
    """
    check_codebook(codebook)
    check_indices(indices)
    check_device("indices", indices, "codebook", codebook)
    if codebook.dim() == 3 and (indices.dim() < 1 or len(indices) != len(codebook)):
        raise ValueError(f"indices must be (H, ...) with H = {len(codebook)}, as codebook has, got {tuple(indices.shape)}")
    return GATHER_CODES(backends.choose(GATHER_CODES, FAMILY, codebook.device.type), codebook, indices)


def code_statistics(
    x: Tensor,
    indices: Tensor,
    num_codes: int,
    *,
    mask: Tensor | None = None,
    heads: bool = False,
    dtype: torch.dtype | None = None,
) -> CodeStatistics:
    """How many rows each code has, and their sum: what a moving average of the codebook or a step of k-means needs.

    ``counts[k] = #{n: indices[n] = k}``, ``sums[k] = sum_{n: indices[n] = k} x[n]``. Sums are taken in fp64 in an order that
    depends on the rows alone, and rounded once: the same bits in every run and for every number of threads. No N x K matrix.

    Args:
        x: (..., D), or (H, ..., D) with ``heads``; fp64, fp32, bf16 or fp16; any strides.
        indices: int64 (...). A row whose index is below 0 counts nowhere; an index past the end counts as the last code.
        num_codes: K.
        mask: (...) bool, True = valid; other rows count nowhere.
        heads: the first dimension is heads with codebooks of their own.
        dtype: of ``sums``: torch.float32 or torch.float64; by default float32, and float64 for fp64 rows. Ranks that add up their
            sums before these are rounded, in float64, get the bits that one process would.

    Returns:
        CodeStatistics: counts (K,), sums (K, D); with ``heads`` (H, K) and (H, K, D). Differentiable once, ``sums`` in x.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a NaN or Inf in a row reaches the sum of its code, and no other.

    Source: the M step of Lloyd 1982; its use in codebooks: van den Oord et al. 2017, appendix A.1.
    """
    check_floats("x", x)
    check_indices(indices)
    check_device("indices", indices, "x", x)
    if not isinstance(heads, bool):
        raise TypeError(f"heads must be a bool, got {type(heads).__name__}")
    if x.dim() < 1 + heads:
        raise ValueError(f"x must be {'(H, ..., D)' if heads else '(..., D)'}, got shape {tuple(x.shape)}")
    if x.shape[-1] < 1:
        raise ValueError(f"x must have D >= 1, got shape {tuple(x.shape)}")
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices must have x's leading shape {tuple(x.shape[:-1])}, got {tuple(indices.shape)}")
    check_num_codes(num_codes)
    check_mask(mask, x)
    if dtype is None:
        dtype = torch.promote_types(x.dtype, torch.float32)
    if dtype not in SUM_DTYPES:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    implementation = backends.choose(CODE_STATISTICS, FAMILY, x.device.type)
    sums, counts = CODE_STATISTICS(implementation, x, indices, mask, num_codes, heads, dtype)
    return CodeStatistics(counts, sums)


def update_codebook_ema_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float = 0.99,
    eps: float = 1e-5,
    normalize: bool = False,
) -> None:
    """Moves a codebook to the moving averages of its rows, in place, with Laplace smoothing.

    ``cluster_size = decay cluster_size + (1 - decay) counts``, ``code_sum = decay code_sum + (1 - decay) sums``; with
    ``n = sum_k cluster_size[k]``, ``codebook[k] = code_sum[k] / ((cluster_size[k] + eps) / (n + K eps) n)``. In fp64 with one
    rounding of each result; the codebook is computed from the averages as they are kept.

    Args:
        codebook: (K, D), or (H, K, D); fp64, fp32, bf16 or fp16; contiguous; written.
        cluster_size: (K,), or (H, K); a floating dtype; contiguous; written.
        code_sum: the codebook's shape; a floating dtype; contiguous; written.
        counts, sums: as `code_statistics` returns them, of the shapes of cluster_size and code_sum; added up over ranks before.
        decay: of the averages, 0 to 1.
        eps: of the smoothing, >= 0.
        normalize: codes are divided by their norms, as cosine codebooks want it.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: one in ``sums`` reaches the code, its sum and no other; one in cluster_size all codes.

    Source: van den Oord et al. 2017, appendix A.1; Razavi et al., Generating Diverse High-Fidelity Images with VQ-VAE-2, 2019.
    """
    check_trained(codebook, cluster_size, code_sum)
    for name, tensor, like in (("counts", counts, cluster_size), ("sums", sums, code_sum)):
        if not isinstance(tensor, Tensor) or tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be a tensor of numbers, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.shape != like.shape:
            raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
        check_device(name, tensor, "codebook", codebook)
    check_range("decay", decay, 0, 1)
    check_range("eps", eps, 0, float("inf"))
    check_flag("normalize", normalize)
    implementation = backends.choose(UPDATE_CODEBOOK_EMA, FAMILY, codebook.device.type)
    UPDATE_CODEBOOK_EMA(implementation, codebook, cluster_size, code_sum, counts, sums, float(decay), float(eps), normalize)


def replace_dead_codes_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    x: Tensor,
    key: Tensor,
    *,
    threshold: float,
    reset_cluster_size: float | None = None,
    normalize: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Gives codes that few rows choose a random row each, in place, without asking the device how many there are.

    A code is dead where ``cluster_size < threshold``. The rows of each head are put in the order of the integers that
    `philox_integers` draws for them (row n of head h has element h N + n; of equal integers the lower row comes first), and
    the j-th dead code of a head gets the j-th row: ``codebook = x``, ``cluster_size = reset_cluster_size`` and
    ``code_sum = reset_cluster_size codebook``. No row is used twice: where there are more dead codes than rows, those with the
    highest indices stay dead until the next call.

    Args:
        codebook, cluster_size, code_sum: as in `update_codebook_ema_`; written.
        x: (..., D), or (H, ..., D); the rows; fp64, fp32, bf16 or fp16.
        key: int64 (2,), (seed, offset), on x's device; another for each call: `mk.fold_in(key, step)`.
        threshold: in rows, as cluster_size is.
        reset_cluster_size: what a replaced code counts afterwards; ``threshold`` by default.
        normalize: rows are divided by their norms.
        mask: (...) bool, True = valid; other rows are not drawn.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a NaN in cluster_size is not below the threshold; a row with NaN may be drawn, mask it.

    Source: Williams et al., Hierarchical Quantized Autoencoders, 2020, "random restarts"; the draw without replacement is ours.
    """
    check_trained(codebook, cluster_size, code_sum)
    check_floats("x", x)
    if x.dim() < codebook.dim() - 1 or x.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"x must hold rows of codebook {tuple(codebook.shape)}, got shape {tuple(x.shape)}")
    if codebook.dim() == 3 and len(x) != len(codebook):
        raise ValueError(f"x and codebook must agree in H, got x {tuple(x.shape)} and codebook {tuple(codebook.shape)}")
    check_device("x", x, "codebook", codebook)
    check_key(key, x.device)
    check_mask(mask, x)
    check_number("threshold", threshold)
    if reset_cluster_size is not None:
        check_number("reset_cluster_size", reset_cluster_size)
    check_flag("normalize", normalize)
    reset = threshold if reset_cluster_size is None else reset_cluster_size
    implementation = backends.choose(REPLACE_DEAD_CODES, FAMILY, codebook.device.type)
    REPLACE_DEAD_CODES(
        implementation, codebook, cluster_size, code_sum, x, mask, as_int64(key), float(threshold), float(reset), normalize
    )


def kmeans(
    x: Tensor,
    num_codes: int,
    key: Tensor | None,
    *,
    iterations: int = 10,
    init: Tensor | None = None,
    metric: str = "l2",
    heads: bool = False,
    mask: Tensor | None = None,
) -> KMeansOutput:
    """k-means by Lloyd's iterations, on x's device, in O(N + K) memory, the same bits in every run.

    The codes start as rows drawn without replacement, in the order of `replace_dead_codes_`; with fewer rows than codes that order
    begins again. Each iteration finds the nearest code of every row, exactly, and moves each code to the mean of its rows; a
    code without rows keeps its place. Metric "cosine": rows and codes are kept on the unit sphere.

    Args:
        x: (..., D), or (H, ..., D) with ``heads``; fp64, fp32, bf16 or fp16.
        num_codes: K.
        key: int64 (2,), (seed, offset), on x's device; may be None if ``init`` is given.
        iterations: of Lloyd, >= 0; never fewer, as stopping early would wait for the device.
        init: (K, D), or (H, K, D), the codes to start from.
        metric: "l2" or "cosine".
        heads: the first dimension of x is heads with codebooks of their own.
        mask: (...) bool, True = valid.

    Returns:
        KMeansOutput: codebook of x's dtype (fp32 for half dtypes), and the rows each code had in the last iteration.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes. Values never raise.

    NaN: a row with NaN goes to code 0 and spoils it; mask it.

    Source: Lloyd, Least squares quantization in PCM, 1982.
    """
    check_floats("x", x)
    check_flag("heads", heads)
    if x.dim() < 1 + heads or x.shape[-1] < 1:
        raise ValueError(f"x must be {'(H, ..., D)' if heads else '(..., D)'} with D >= 1, got shape {tuple(x.shape)}")
    check_num_codes(num_codes)
    check_choice("metric", metric, ("l2", "cosine"))
    check_mask(mask, x)
    if not isinstance(iterations, int) or isinstance(iterations, bool):
        raise TypeError(f"iterations must be an int, got {type(iterations).__name__}")
    if iterations < 0:
        raise ValueError(f"iterations must be >= 0, got {iterations}")
    wide = torch.promote_types(x.dtype, torch.float32)
    lead = tuple(x.shape[:1]) if heads else ()
    rows = x.detach().to(wide)
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    if init is not None:
        check_codebook(init, "init")
        if init.shape != (*lead, num_codes, x.shape[-1]):
            raise ValueError(f"init must have shape {(*lead, num_codes, x.shape[-1])}, got {tuple(init.shape)}")
        check_device("init", init, "x", x)
        codes = init.detach().to(wide)
    else:
        if key is None:
            raise TypeError("key must be an int64 tensor (2,), got None and no init")
        check_key(key, x.device)
        if rows[..., 0].numel() == 0:
            raise ValueError(f"x must hold at least one row to start from, got shape {tuple(x.shape)}")
        codes = drawn_rows(rows, num_codes, as_int64(key), heads, mask)
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1)
    counts = torch.zeros(*lead, num_codes, dtype=torch.int64, device=x.device)
    for _ in range(iterations):
        counts, sums = code_statistics(rows, nearest_code(rows, codes, mask=mask), num_codes, heads=heads)
        rows_of_code = counts[..., None]
        moved = torch.nn.functional.normalize(sums, dim=-1) if metric == "cosine" else sums / rows_of_code.clamp(min=1)
        codes = torch.where(rows_of_code > 0, moved, codes)
    return KMeansOutput(codes, counts)


def drawn_rows(rows: Tensor, count: int, key: Tensor, heads: bool, mask: Tensor | None) -> Tensor:
    """`count` rows of each head, (H, count, D) or (count, D), without replacement as long as there are enough."""
    per_head = rows.reshape(len(rows) if heads else 1, -1, rows.shape[-1])  # (H, N, D)
    order, valid = reference.random_order(per_head.shape[:2], mask, key)
    places = torch.arange(count, device=rows.device) % valid.clamp(min=1)  # (H, count)
    drawn = per_head.gather(1, order.gather(1, places)[..., None].expand(-1, -1, rows.shape[-1]))
    return drawn if heads else drawn[0]


# -- checks -----------------------------------------------------------------------------------------------------------


def check_trained(codebook: Tensor, cluster_size: Tensor, code_sum: Tensor) -> None:
    check_codebook(codebook)
    for name, tensor, shape in (
        ("cluster_size", cluster_size, codebook.shape[:-1]),
        ("code_sum", code_sum, codebook.shape),
    ):
        check_floats(name, tensor)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        check_device(name, tensor, "codebook", codebook)
    for name, tensor in (("codebook", codebook), ("cluster_size", cluster_size), ("code_sum", code_sum)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous to be written, got strides {tuple(tensor.stride())}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient to be written: call this under torch.no_grad()")


def check_num_codes(num_codes: int) -> None:
    if not isinstance(num_codes, (int, torch.SymInt)) or isinstance(num_codes, bool):
        raise TypeError(f"num_codes must be an int, got {type(num_codes).__name__}")
    if not 1 <= num_codes <= MAX_CODES:
        raise ValueError(f"num_codes must be 1 to 2^31 - 1, got {num_codes}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    check_number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}, got {value}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def as_int64(key: Tensor) -> Tensor:
    return key.view(torch.int64) if key.dtype == torch.uint64 else key


# -- registration -----------------------------------------------------------------------------------------------------


def code_statistics_fake(x, indices, mask, num_codes, heads, dtype):
    lead = x.shape[:1] if heads else ()
    return x.new_empty((*lead, num_codes, x.shape[-1]), dtype=dtype), x.new_empty((*lead, num_codes), dtype=torch.int64)


def writes(*arguments: Any) -> None:
    """The fake of an operator that writes its arguments."""


GATHER_CODES = library.define(
    "gather_codes(Tensor codebook, Tensor indices) -> Tensor codes",
    reference=reference.gather_codes,
    fake=lambda codebook, indices: codebook.new_empty((*indices.shape, codebook.shape[-1])),
    backward="gather_codes_backward(Tensor? grad_codes, Tensor indices, SymInt[] codebook_shape) -> Tensor grad_codebook",
    backward_reference=reference.gather_codes_backward,
    backward_fake=lambda grad_codes, indices, codebook_shape: indices.new_empty(
        codebook_shape, dtype=torch.float32 if grad_codes is None else grad_codes.dtype
    ),
    launchers={"triton": (f"{TRITON}:gather_codes", f"{TRITON}:gather_codes_backward")},
)

CODE_STATISTICS = library.define(
    "code_statistics(Tensor x, Tensor indices, Tensor? mask, SymInt num_codes, bool heads, ScalarType dtype)"
    " -> (Tensor sums, Tensor counts)",  # opcheck differentiates the sum of all outputs, begun with the first: no integers
    reference=reference.code_statistics,
    fake=code_statistics_fake,
    backward="code_statistics_backward(Tensor? grad_sums, Tensor x, Tensor indices, Tensor? mask) -> Tensor grad_x",
    backward_reference=reference.code_statistics_backward,
    backward_fake=lambda grad_sums, x, indices, mask: x.new_empty(x.shape),
    launchers={"triton": (f"{TRITON}:code_statistics", f"{TRITON}:code_statistics_backward")},
)

UPDATE_CODEBOOK_EMA = library.define(
    "update_codebook_ema_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) code_sum, Tensor counts, Tensor sums,"
    " float decay, float eps, bool normalize) -> ()",
    reference=reference.update_codebook_ema_,
    fake=writes,
    launchers={"triton": f"{TRITON}:update_codebook_ema_"},
)

REPLACE_DEAD_CODES = library.define(
    "replace_dead_codes_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) code_sum, Tensor x, Tensor? mask, Tensor key,"
    " float threshold, float reset, bool normalize) -> ()",
    reference=reference.replace_dead_codes_,
    fake=writes,
    launchers={"triton": f"{TRITON}:replace_dead_codes_"},
)
