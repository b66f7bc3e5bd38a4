"""The straight-through quantizer that model code writes in PyTorch, forward and backward. PyTorch: BSD-3-Clause.

taming-transformers' VectorQuantizer2 (legacy=False), without |x|^2 in the distances, which can only help it.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Contestant

BETA = 0.25


def quantize(x, codebook):
    """x (N, D), codebook (K, D) -> quantized (N, D), indices (N,), loss ()."""
    with torch.no_grad():
        indices = torch.addmm(codebook.square().sum(-1), x, codebook.t(), alpha=-2).argmin(dim=-1)
    chosen = F.embedding(indices, codebook)
    loss = F.mse_loss(chosen, x.detach()) + BETA * F.mse_loss(chosen.detach(), x)
    return x + (chosen - x).detach(), indices, loss


def step_with(quantizer, x, codebook, upstream):
    """The timed training step: (indices, loss, dx, dcodebook) of `(upstream * quantized).sum() + loss`."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()

    def step():
        quantized, indices, loss = quantizer(x, codebook)
        dx, dcodebook = torch.autograd.grad((quantized, loss), (x, codebook), (upstream, torch.ones_like(loss)))
        return indices, loss.detach(), dx, dcodebook

    return step


def _step(x, codebook, upstream):
    return step_with(quantize, x, codebook, upstream)


vector_quantize = Contestant("stock", _step, scratch=4.0, settings={"beta": BETA})
