"""What the kernels of the backward compute again: weights from logits and the saved lse, and gradients of logits."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from mmgen_kernels.attn.triton_kernels.tiles import contract, exponential, in_units, load_bias, load_tiles


@triton.jit
def load_exponent(lse, row, rows, like):
    """What is subtracted from logits, in fp64 of fp32 inputs: infinity where there are no keys, or no row: all weights are 0."""
    value = in_units(tl.load(lse + row, mask=row < rows, other=float("-inf")), like)
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def row_products(out, out_t, grad, lse_grad, row, rows, D: tl.constexpr, IN: tl.constexpr, UNIT: tl.constexpr):
    """delta, (M,): sum_d out dout, which is sum_s P dP, less the gradient of lse, which is P itself. grad is loaded.

    fp32 is summed in fp64: the error of delta is shared by the gradients of all logits of a query, and does not average out.
    """
    outs = load_tiles(out, row, rows, out_t, D, IN, UNIT, True)
    wide: tl.constexpr = tl.float64 if outs[0].dtype == tl.float32 else tl.float32
    delta = tl.sum(outs[0].to(wide) * grad[0].to(wide), 1)
    for i in tl.static_range(1, len(IN)):
        delta += tl.sum(outs[i].to(wide) * grad[i].to(wide), 1)
    delta = delta.to(tl.float32)
    if lse_grad is not None:
        delta -= tl.load(lse_grad + row, mask=row < rows, other=0.0).to(tl.float32)
    return delta


@triton.jit
def weights_of(queries, keys, exponent, row, rows, column, columns, bias, bias_t, bias_s, scale, like):
    """(M, N), or with the operands exchanged (N, M): exponent, row and column are shaped to broadcast."""
    logits = contract(queries, keys) * scale
    if bias is not None:
        logits += load_bias(bias, row, rows, column, columns, bias_t, bias_s, like)
    return exponential((logits - exponent).to(tl.float32), like)


@triton.jit
def grad_of_logits(weights, grad_weights, delta, CHECKED: tl.constexpr):
    """A weight of 0 has gradient 0 whatever an infinite or unseen value made of the rest. That costs two instructions for each
    weight, and is CHECKED only where weights can be masked."""
    gradient = weights * (grad_weights - delta)
    return tl.where(weights == 0.0, 0.0, gradient) if CHECKED else gradient
