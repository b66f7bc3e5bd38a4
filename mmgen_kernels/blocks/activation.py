"""The activation between the projections of an MLP as an operator, whose backward computes the activation again in the same pass.

Not public: `adaln_mlp` and `dit_block` call it. ``gelu_tanh``: (..., M) -> (..., M); ``swiglu``: (..., 2 M) -> (..., M), silu(a) b
of the two halves. Computed in fp32, in fp64 for fp64, and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgen_kernels import library

FUSED = ("gelu_tanh", "swiglu")  # "gelu" is torch's: its error function is no exponential, which is what we have vectors of


def reference(hidden: Tensor, activation: str) -> Tensor:
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh").to(hidden.dtype)
    gate, value = x.chunk(2, -1)
    return (F.silu(gate) * value).to(hidden.dtype)


def reference_backward(
    grad_activated: Tensor | None, hidden: Tensor, activation: str, need_grad_hidden: bool
) -> tuple[Tensor, Tensor]:
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    activated = reference(hidden, activation)
    grad = torch.zeros_like(activated, dtype=x.dtype) if grad_activated is None else grad_activated.to(x.dtype)
    if activation == "gelu_tanh":
        of_x = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    else:
        gate, value = x.chunk(2, -1)
        of_x = torch.cat((torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)), -1)
    return of_x.to(hidden.dtype), activated


def fake(hidden: Tensor, activation: str) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], hidden.shape[-1] // (2 if activation == "swiglu" else 1)))


MLP_ACTIVATION = library.define(
    "mlp_activation(Tensor hidden, str activation) -> Tensor activated",
    reference=reference,
    fake=fake,
    backward="mlp_activation_backward(Tensor? grad_activated, Tensor hidden, str activation, bool need_grad_hidden)"
    " -> (Tensor grad_hidden, Tensor activated)",
    backward_reference=reference_backward,
    backward_fake=lambda grad, hidden, activation, need: (hidden.new_empty(hidden.shape), fake(hidden, activation)),
    launchers={
        "triton": (
            "mmgen_kernels.blocks.triton_kernels:mlp_activation",
            "mmgen_kernels.blocks.triton_kernels:mlp_activation_backward",
        )
    },
)
