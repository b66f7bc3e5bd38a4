"""The family in plain PyTorch: oracle of the tests, fallback on every device, baseline of the benchmarks.

x is (B, T, D). A modulation vector is (D,), (B, D) or (B, F, D) with F a divisor of T, F spans of T / F tokens each; with `rows`
(B, T) it is (R, D) or (D,). `table` (V, D) holds one row for each vector given, in the order of the arguments.

Everything is computed in fp32, in fp64 for fp64 x, and rounded once. The norm sees the residual as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Vectors = dict[str, Tensor | None]



def sigmoid_one_minus(gate: Tensor) -> Tensor:
    """torch.sigmoid on CPU has other bits for the elements behind the last full vector: a sample's would depend on its batch."""
    return (1 + (gate - 1).exp()).reciprocal()


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda gate: gate,
    "tanh": torch.tanh,
    "sigmoid_one_minus": sigmoid_one_minus,
}
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "tanh": lambda gate: 1 - gate.tanh().square(),
    "sigmoid_one_minus": lambda gate: sigmoid_one_minus(gate) * (sigmoid_one_minus(gate) - 1),
}


def adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = per_token({"shift": shift, "scale": scale, "shift_2": shift_2, "scale_2": scale_2}, table, rows, x)
    normed, statistics = normalize(widen(x), norm, eps)
    n = affine(normed, weight, bias)
    modulated = modulate(n, vectors["shift"], vectors["scale"]).to(dtype)
    return modulated, second_output(n, vectors, dtype), statistics


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    post_eps: float,
) -> tuple[Tensor, Tensor]:
    y, statistics = post_normed(y, post_weight, post_norm, post_eps, wide_dtype(x))
    gate = per_token({"gate": gate}, table, rows, x)["gate"]
    update = y if gate is None else GATES[gate_fn](gate.to(y.dtype)) * y
    return (x.to(y.dtype) + update).to(x.dtype), statistics


def gate_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    post_eps: float,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_gate, of_norm = split_table(table, gate)
    residual, post_statistics = gate_residual(x, y, gate, post_weight, of_gate, rows, gate_fn, post_norm, post_eps)
    outputs = adaln(residual, shift, scale, shift_2, scale_2, weight, bias, of_norm, rows, norm, eps, dtype)
    return residual, *outputs, post_statistics


# -- the parts --------------------------------------------------------------------------------------------------------


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the computation."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def split_table(table: Tensor | None, gate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The rows of the gate and of what follows it."""
    first = 0 if gate is None else 1
    return (None, None) if table is None else (table[:first], table[first:])


def per_token(vectors: Vectors, table: Tensor | None, rows: Tensor | None, x: Tensor) -> Vectors:
    """Each vector in the dtype of the computation, its row of the table added: (D,), (B, 1, D) or (B, T, D)."""
    given = [name for name, vector in vectors.items() if vector is not None]
    wide = wide_dtype(x)
    found: Vectors = {}
    for name, vector in vectors.items():
        if vector is not None:
            vector = spread(vector, rows, x).to(wide)
            vector = vector if table is None else vector + table[given.index(name)].to(wide)
        found[name] = vector
    return found


def spread(vector: Tensor, rows: Tensor | None, x: Tensor) -> Tensor:
    """What broadcasts with x (B, T, D)."""
    if vector.dim() == 1:
        return vector  # (D,)
    if rows is not None:
        return vector[rows.clamp(0, len(vector) - 1)]  # (B, T, D)
    if vector.dim() == 2:
        return vector.unsqueeze(1)  # (B, 1, D)
    return vector if vector.shape[1] in (1, x.shape[1]) else vector.repeat_interleave(x.shape[1] // vector.shape[1], 1)


def normalize(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """x without mean (layer) and with unit variance (or, rms, mean square); statistics (B, T, 2): mean (rms: 0), 1 / deviation.

    The mean is taken of the distances to the row's first element, or its rounding error would be that of numbers as large as the
    mean: a row of equal elements would not be 0 (1000.1 gave 0.12), and one far from 0 less exact than torch's own.
    """
    centred = x = x.contiguous()  # the order of torch's sums, and with it their rounding, depends on strides
    mean = torch.zeros_like(x[..., :1])
    if norm == "layer":
        mean = x[..., :1] + (x - x[..., :1]).mean(-1, keepdim=True)
        centred = x - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, torch.cat((mean, rstd), -1)


def affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normed = normed if weight is None else normed * weight.to(normed.dtype)
    return normed if bias is None else normed + bias.to(normed.dtype)


def modulate(n: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    n = n if scale is None else n * (1 + scale)
    return n if shift is None else n + shift


def second_output(n: Tensor, vectors: Vectors, dtype: torch.dtype) -> Tensor:
    """Empty where no second output is asked for."""
    if vectors["shift_2"] is None and vectors["scale_2"] is None:
        return n.new_empty(0, dtype=dtype)
    return modulate(n, vectors["shift_2"], vectors["scale_2"]).to(dtype)


def post_normed(
    y: Tensor, weight: Tensor | None, norm: str | None, eps: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    if norm is None:
        return y.to(wide), y.new_empty(0, dtype=wide)
    normed, statistics = normalize(y.to(wide), norm, eps)
    return affine(normed, weight, None), statistics


# -- gradients --------------------------------------------------------------------------------------------------------


def adaln_backward(
    grad_modulated: Tensor | None,
    grad_modulated_2: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    norm: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    grad_x, grads = norm_gradients(
        grad_modulated, grad_modulated_2, x, statistics, shift, scale, shift_2, scale_2, weight, bias, table, rows, norm
    )
    vectors = {"shift": shift, "scale": scale, "shift_2": shift_2, "scale_2": scale_2}
    gradients = [grad_x.to(x.dtype), *(collect(grads[name], of, rows) for name, of in vectors.items())]
    gradients += [collect(grads["weight"], weight, rows), collect(grads["bias"], bias, rows), of_table(grads, vectors, table)]
    return needed(gradients, needs, x)


def gate_residual_backward(
    grad_residual: Tensor | None,
    y: Tensor,
    post_statistics: Tensor,
    gate: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    *needs: bool,
) -> tuple[Tensor, ...]:
    grad = torch.zeros_like(y) if grad_residual is None else grad_residual
    grad_y, grads = gate_gradients(
        widen(grad), y, post_statistics, gate, post_weight, table, rows, gate_fn, post_norm
    )
    # never the memory of grad_residual, which is the gradient of x
    gradients: list[Tensor | None] = [grad_y.to(y.dtype, copy=gate is None)]
    gradients += [collect(grads["gate"], gate, rows), collect(grads["post_weight"], post_weight, rows)]
    return needed([*gradients, of_table(grads, {"gate": gate}, table)], needs, y)


def gate_residual_adaln_backward(
    grad_residual: Tensor | None,
    grad_modulated: Tensor | None,
    grad_modulated_2: Tensor | None,
    y: Tensor,
    residual: Tensor,
    statistics: Tensor,
    post_statistics: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_2: Tensor | None,
    scale_2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    post_weight: Tensor | None,
    table: Tensor | None,
    rows: Tensor | None,
    gate_fn: str,
    post_norm: str | None,
    norm: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    of_gate, of_norm = split_table(table, gate)
    grad, grads = norm_gradients(
        grad_modulated, grad_modulated_2, residual, statistics, shift, scale, shift_2, scale_2, weight, bias, of_norm, rows, norm
    )
    if grad_residual is not None:
        grad = grad + grad_residual.to(grad.dtype)
    grad_y, of_update = gate_gradients(
        widen(grad), y, post_statistics, gate, post_weight, of_gate, rows, gate_fn, post_norm
    )
    grads |= of_update
    vectors = {"gate": gate, "shift": shift, "scale": scale, "shift_2": shift_2, "scale_2": scale_2}
    # never one memory for both
    gradients: list[Tensor | None] = [grad.to(residual.dtype), grad_y.to(y.dtype, copy=gate is None)]
    shared = {"weight": weight, "bias": bias, "post_weight": post_weight}
    gradients += [collect(grads[name], of, rows) for name, of in (vectors | shared).items()]
    return needed([*gradients, of_table(grads, vectors, table)], needs, residual)


def norm_gradients(
    grad_modulated, grad_modulated_2, x, statistics, shift, scale, shift_2, scale_2, weight, bias, table, rows, norm
) -> tuple[Tensor, Vectors]:
    """Of x, and of every vector for every token: (B, T, D) in the dtype of the computation, None where there is no vector.

    With n = weight * normed + bias and m = n (1 + scale) + shift:
    dshift = dm, dscale = dm n, dn = dm (1 + scale), dweight = dn normed, dbias = dn, and, layer norm's own,
    dx = rstd (g - mean(g) - normed mean(g normed)) with g = dn weight; rms: without mean(g).
    """
    vectors = per_token({"shift": shift, "scale": scale, "shift_2": shift_2, "scale_2": scale_2}, table, rows, x)
    mean, rstd = statistics[..., :1], statistics[..., 1:]
    normed = (widen(x) - mean) * rstd
    n = affine(normed, weight, bias)
    grads: Vectors = {}
    grad_n = torch.zeros_like(n)
    for grad, suffix in ((grad_modulated, ""), (grad_modulated_2, "_2")):
        grad = torch.zeros_like(n) if grad is None else grad.to(n.dtype).contiguous()
        scale_of = vectors[f"scale{suffix}"]
        grads[f"shift{suffix}"], grads[f"scale{suffix}"] = grad, grad * n
        grad_n = grad_n + modulate(grad, None, scale_of)
    grads |= {"weight": grad_n * normed, "bias": grad_n}
    return norm_backward(affine(grad_n, weight, None), normed, rstd, norm), grads


def gate_gradients(grad, y, statistics, gate, post_weight, table, rows, gate_fn, post_norm) -> tuple[Tensor, Vectors]:
    """Of y, gate and post_weight, for every token, given the gradient of the sum x + g(gate) y."""
    gate = per_token({"gate": gate}, table, rows, grad)["gate"]
    y, grad = y.to(grad.dtype), grad.contiguous()
    normed = y if post_norm is None else (y - statistics[..., :1]) * statistics[..., 1:]
    update = affine(normed, post_weight, None)
    grad_update = grad if gate is None else grad * GATES[gate_fn](gate)
    grads: Vectors = {
        "gate": None if gate is None else grad * update * DERIVATIVES[gate_fn](gate),
        "post_weight": grad_update * normed,
    }
    grad_normed = affine(grad_update, post_weight, None)
    return grad_normed if post_norm is None else norm_backward(grad_normed, normed, statistics[..., 1:], post_norm), grads


def norm_backward(grad: Tensor, normed: Tensor, rstd: Tensor, norm: str) -> Tensor:
    centred = grad - grad.mean(-1, keepdim=True) if norm == "layer" else grad
    return rstd * (centred - normed * (grad * normed).mean(-1, keepdim=True))


def of_table(grads: Vectors, vectors: Vectors, table: Tensor | None) -> Tensor | None:
    if table is None:
        return None
    of_given = (grads[name] for name, vector in vectors.items() if vector is not None)
    sums = [grad.sum((0, 1)) for grad in of_given if grad is not None]
    return torch.stack(sums).to(table.dtype)


def collect(grad: Tensor | None, vector: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """The sum of (B, T, D) over the tokens that share an element of the vector, in fixed order, without atomic additions."""
    if grad is None or vector is None:
        return None
    B, T, D = grad.shape
    if vector.dim() == 1:
        total = grad.sum((0, 1))
    elif rows is not None:
        total = sum_by_row(grad.reshape(B * T, D), rows.reshape(-1), len(vector))
    elif vector.dim() == 2:
        total = grad.sum(1)
    else:
        F = vector.shape[1]
        total = grad.reshape(B, F, T // max(1, F), D).sum(2)
    return total.to(vector.dtype)


def sum_by_row(grad: Tensor, rows: Tensor, count: int) -> Tensor:
    """(R, D): a stable sort by row, then sums in the order of the tokens."""
    ordered, order = rows.clamp(0, count - 1).sort(stable=True)
    if len(order) == 0:
        return grad.new_zeros(count, grad.shape[1])
    ends = torch.searchsorted(ordered, torch.arange(count, dtype=rows.dtype, device=rows.device), right=True)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    # unsafe: the lengths are right by construction, and to check them torch would wait for the GPU
    return torch.segment_reduce(grad[order], "sum", lengths=lengths, axis=0, unsafe=True)


def needed(gradients: list[Tensor | None], needs: tuple[bool, ...], like: Tensor) -> tuple[Tensor, ...]:
    """A gradient that nobody needs is empty."""
    return tuple(g if need and g is not None else like.new_empty(0) for g, need in zip(gradients, needs, strict=True))
