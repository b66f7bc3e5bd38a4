"""The activation between the projections of an MLP: one launch forward, one backward, a program for BLOCK results of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # 8 results a thread of 4 warps: 16 bytes of bf16 in one load


@triton.jit
def two_u(x):
    """Of gelu_tanh(x) = x sigmoid(2 u): 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * (x * x * 0.07135481627260025 + 1.5957691216057308)


@triton.jit
def slope_of_two_u(x):
    return x * x * 0.21406444881780076 + 1.5957691216057308


@triton.jit
def sigmoid(u):
    """sigmoid(u) and, without the difference, 1 - sigmoid(u). e^-|u| is at most 1."""
    e = tl.exp(-tl.abs(u))
    small, large = e / (1.0 + e), 1.0 / (1.0 + e)
    return tl.where(u >= 0, large, small), tl.where(u >= 0, small, large)


@triton.jit(do_not_specialize=["width", "parts"])
def activation_forward(hidden, activated, width, parts, GATED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    at = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    there = at < width
    x = tl.load(hidden + row * width * (2 if GATED else 1) + at, there, other=0.0).to(WIDE)
    if GATED:
        s, _ = sigmoid(x)
        y = x * s * tl.load(hidden + (2 * row + 1) * width + at, there, other=0.0).to(WIDE)
    else:
        s, _ = sigmoid(two_u(x))
        y = x * s
    tl.store(activated + row * width + at, y.to(activated.dtype.element_ty), there)


@triton.jit(do_not_specialize=["width", "parts"])
def activation_backward(
    grad, hidden, activated, grad_hidden, width, parts, GATED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    at = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    there = at < width
    g = tl.load(grad + row * width + at, there, other=0.0).to(WIDE)
    if GATED:
        x = tl.load(hidden + 2 * row * width + at, there, other=0.0).to(WIDE)
        v = tl.load(hidden + (2 * row + 1) * width + at, there, other=0.0).to(WIDE)
        s, rest = sigmoid(x)
        y = x * s * v
        of_x = g * v * s * (1 + x * rest)
        tl.store(grad_hidden + 2 * row * width + at, of_x.to(grad_hidden.dtype.element_ty), there)
        tl.store(grad_hidden + (2 * row + 1) * width + at, (g * x * s).to(grad_hidden.dtype.element_ty), there)
    else:
        x = tl.load(hidden + row * width + at, there, other=0.0).to(WIDE)
        s, rest = sigmoid(two_u(x))
        y = x * s
        # where the function is a line to the last bit, an infinite slope must not make 0 * Inf of it
        of_x = g * (s + tl.where(y * rest == 0, 0.0, y * rest * slope_of_two_u(x)))
        tl.store(grad_hidden + row * width + at, of_x.to(grad_hidden.dtype.element_ty), there)
    tl.store(activated + row * width + at, y.to(activated.dtype.element_ty), there)


def mlp_activation(hidden: Tensor, activation: str) -> Tensor:
    activated = hidden.new_empty((*hidden.shape[:-1], hidden.shape[-1] // (2 if activation == "swiglu" else 1)))
    launch(activation_forward, (hidden.contiguous(), activated), activated, activation)
    return activated


def mlp_activation_backward(grad: Tensor | None, hidden: Tensor, activation: str, need_grad_hidden: bool) -> tuple[Tensor, Tensor]:
    activated = hidden.new_empty((*hidden.shape[:-1], hidden.shape[-1] // (2 if activation == "swiglu" else 1)))
    grad = torch.zeros_like(activated) if grad is None else grad.contiguous()
    grad_hidden = hidden.new_empty(hidden.shape)
    launch(activation_backward, (grad, hidden.contiguous(), activated, grad_hidden), activated, activation)
    return grad_hidden, activated


def launch(kernel, tensors: tuple[Tensor, ...], activated: Tensor, activation: str) -> None:
    gated = activation == "swiglu"
    width = activated.shape[-1] if gated else activated.numel()  # without halves the rows are one
    if activated.numel() == 0:
        return
    parts = triton.cdiv(width, BLOCK)
    wide = tl.float64 if activated.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(activated):
        kernel[(activated.numel() // width * parts,)](
            *tensors, width, parts, GATED=gated, WIDE=wide, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )
