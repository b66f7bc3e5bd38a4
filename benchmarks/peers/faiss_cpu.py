"""FAISS on the CPU: `faiss.knn`, brute force without an index. MIT.

An index would have to be filled again after each change of the codebook; `IndexFlatL2` filled beforehand takes the
same time within 8 % (4096x16384x8, 8192x1024x64, 4096x8192x256). Arrays are views of the tensors, and the thread count
is torch's.
"""

import torch

from benchmarks.harness import Contestant


def _lookup(x, codebook):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    if x.dim() == 3:
        heads = [(head.numpy(), codes.numpy()) for head, codes in zip(x, codebook, strict=True)]
        return lambda: torch.stack([torch.from_numpy(faiss.knn(head, codes, 1)[1][:, 0]) for head, codes in heads])
    rows, codes = x.numpy(), codebook.numpy()
    return lambda: torch.from_numpy(faiss.knn(rows, codes, 1)[1][:, 0])


nearest_code = Contestant("faiss", _lookup, requires="faiss", devices=("cpu",))
