"""The entropy loss that model code writes in PyTorch, with its N x K matrices, forward and backward. PyTorch: BSD-3-Clause.

The form of LlamaGen's and SEED-Voken's compute_entropy_loss: softmax and log_softmax of scores / temperature, both entropies.
"""

import torch

from benchmarks.harness import Contestant


def entropies(x, codebook, metric, temperature, eps):
    """x (N, D), codebook (K, D) -> mean of the rows' entropies, entropy of the mean."""
    scores = x @ codebook.t()  # (N, K)
    if metric == "l2":
        scores = -(x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * scores)
    scores = scores / temperature
    p, log_p = scores.softmax(-1), scores.log_softmax(-1)
    q = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(q * (q + eps).log()).sum()


def step_with(function, x, codebook):
    """The timed training step: (sample_entropy, mean_entropy, dx, dcodebook) of `sample_entropy.mean() - mean_entropy`."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()

    def step():
        sample, mean = function(x, codebook)
        gradients = torch.autograd.grad(sample - mean, (x, codebook))
        return sample.detach(), mean.detach(), *gradients

    return step


def stock(**options) -> Contestant:
    return Contestant("stock", lambda x, codebook: step_with(lambda a, b: entropies(a, b, **options), x, codebook), scratch=32.0)


def compiled(**options) -> Contestant:
    def make(x, codebook):
        torch._dynamo.reset()  # contestants of other shapes came before, and recompilations are limited
        function = torch.compile(lambda a, b: entropies(a, b, **options), fullgraph=True, dynamic=False)
        return step_with(function, x, codebook)

    return Contestant("compile", make, scratch=32.0, compiles=True)
