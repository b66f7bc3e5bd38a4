"""The expanded form in stock PyTorch: argmin of |c|^2 - 2 x.c by one fused product. PyTorch: BSD-3-Clause.

taming-transformers, LlamaGen, VAR and EnCodec add |x|^2 as well, which costs a pass over the N x K matrix and digits;
the form without it is the stronger rival. The norms are inside the timed call: in training the codebook changes.
"""

import torch

from benchmarks.harness import Contestant


def _lookup(x, codebook):
    if x.dim() == 3:
        return lambda: torch.baddbmm(
            codebook.square().sum(-1)[:, None, :], x, codebook.transpose(1, 2), alpha=-2
        ).argmin(dim=-1)
    return lambda: torch.addmm(codebook.square().sum(-1), x, codebook.t(), alpha=-2).argmin(dim=-1)


nearest_code = Contestant("addmm", _lookup, scratch=4.0)
