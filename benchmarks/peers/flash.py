"""Lookups for k-means on NVIDIA GPUs: flashlib 0.4 (Apache-2.0; CuTe DSL on Hopper, else Triton) and flash-kmeans 0.3 (Triton).

In fp32 both multiply in TF32, which is not exact; `-fp16` is given inputs that were rounded before the clock starts, as their own
tables are. Neither has heads on its fast path, nor promises the lowest index on equal distances.
"""

import torch

from benchmarks.harness import Contestant


def _batched(x, codebook, dtype):
    lead = () if x.dim() == 3 else (None,)
    return x[lead].to(dtype), codebook[lead].to(dtype)


def _flashlib(dtype):
    def make(x, codebook):
        from flashlib.primitives.kmeans.cutedsl.assign import cutedsl_assign_euclid

        rows, codes = _batched(x, codebook, dtype)
        return lambda: cutedsl_assign_euclid(rows, codes).long().view(x.shape[:-1])

    return make


def _flash_kmeans(dtype):
    def make(x, codebook):
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        rows, codes = _batched(x, codebook, dtype)
        squares = rows.float().square().sum(-1)  # that it asks for and whose time is its caller's
        return lambda: euclid_assign_triton(rows, codes, squares).long().view(x.shape[:-1])

    return make


CUDA = {"devices": ("cuda",)}
nearest_code = (
    Contestant("flashlib", _flashlib(torch.float32), requires="flashlib", **CUDA),
    Contestant("flashlib-fp16", _flashlib(torch.float16), requires="flashlib", **CUDA),
    Contestant("flash-kmeans", _flash_kmeans(torch.float32), requires="flash_kmeans", **CUDA),
    Contestant("flash-kmeans-fp16", _flash_kmeans(torch.float16), requires="flash_kmeans", **CUDA),
)
