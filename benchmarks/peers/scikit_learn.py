"""scikit-learn's `pairwise_distances_argmin`. BSD-3-Clause.

Its scan for NaN and Inf is switched off, which it allows; arrays are views of the tensors, and its OpenMP threads
follow OMP_NUM_THREADS, which the command line sets before anything is imported.
"""

import torch

from benchmarks.harness import Contestant


def _lookup(x, codebook):
    import sklearn
    from sklearn.metrics import pairwise_distances_argmin

    sklearn.set_config(assume_finite=True)
    if x.dim() == 3:
        heads = [(head.numpy(), codes.numpy()) for head, codes in zip(x, codebook, strict=True)]
        return lambda: torch.stack([torch.from_numpy(pairwise_distances_argmin(*head)) for head in heads])
    rows, codes = x.numpy(), codebook.numpy()
    return lambda: torch.from_numpy(pairwise_distances_argmin(rows, codes))


nearest_code = Contestant("sklearn", _lookup, requires="sklearn", devices=("cpu",))
