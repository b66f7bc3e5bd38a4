"""Lookups for k-means on NVIDIA GPUs, both Apache-2.0: flashlib 0.4 (Triton; CuTe DSL on Hopper) and flash-kmeans 0.3 (Triton).

In fp32 both multiply in TF32, which is not exact; `-fp16` is given inputs that were rounded before the clock starts, as their own
tables are. flashlib's CuTe kernel takes half precision and one head only, and its module cannot be imported without
nvidia-cutlass-dsl; where it declines a shape it calls flashlib's Triton kernel, whose time then stands twice. None of them
promises the lowest index on equal distances.
"""

import torch

from benchmarks.harness import Contestant


def _batched(x, codebook, dtype):
    lead = () if x.dim() == 3 else (None,)
    return x[lead].to(dtype), codebook[lead].to(dtype)


def _flashlib(dtype):
    def make(x, codebook):
        from flashlib.primitives.kmeans import euclid_assign_triton

        rows, codes = _batched(x, codebook, dtype)
        return lambda: euclid_assign_triton(rows, codes).long().view(x.shape[:-1])

    return make


def _flashlib_cute(x, codebook):
    from flashlib.primitives.kmeans import cutedsl_assign_euclid

    rows, codes = _batched(x, codebook, torch.float16)
    return lambda: cutedsl_assign_euclid(rows, codes).long().view(x.shape[:-1])


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
    Contestant("flashlib-cute-fp16", _flashlib_cute, requires="cutlass", **CUDA),
    Contestant("flash-kmeans", _flash_kmeans(torch.float32), requires="flash_kmeans", **CUDA),
    Contestant("flash-kmeans-fp16", _flash_kmeans(torch.float16), requires="flash_kmeans", **CUDA),
)
