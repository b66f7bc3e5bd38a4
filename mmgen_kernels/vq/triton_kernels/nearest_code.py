"""nearest_code on NVIDIA GPUs: memory, launches, tile sizes. No value is looked at on the host, so that a graph can capture it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmgen_kernels.vq import reference
from mmgen_kernels.vq.reference import with_heads
from mmgen_kernels.vq.triton_kernels import prepare, search

MAX_CHUNKS = 1024  # minima per row: 4 KiB, whatever K is
MAX_HEADS = 65_535  # of a grid's second axis
MAX_COORDINATE = 2**31 - 1  # of a tensor descriptor
OLDEST = (8, 0)  # capability: the first with asynchronous copies and mma.m16n8k16
PROGRAMS_PER_SM = 2
# Roundings count here. Without a limit of its own ptxas keeps to 64 registers, or 128, and spills a few.
PREPARING = {"enable_fp_fusion": False, "num_warps": 4, "maxnreg": 240}
SETTLING = {"enable_fp_fusion": False, "num_warps": 4, "maxnreg": 128}


class Configuration(NamedTuple):
    """D as padded with zeros, and the tile sizes of the pass."""

    d_pad: int
    block_d: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool  # codes come by tensor descriptor

    def options(self) -> dict[str, Any]:
        """The bound of the pass holds with and without fused multiply-add."""
        return {"enable_fp_fusion": True, "num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def configuration(D: int, capability: tuple[int, int]) -> Configuration:
    """Depends on D and the chip only: no kernel is compiled anew for another N or K.

    128 rows by 128 codes are 64 fp32 sums a thread with 8 warps, so that 128 registers suffice on sm_90 and two blocks share a
    multiprocessor: one multiplies while the other takes minima. In fp16 the rows take 256 * block_d bytes of shared memory and
    each stage of the pipeline 2 * block_k * block_d.

    From sm_90 on a tile of codes comes by its tensor descriptor: the copy engine computes its addresses, so that no thread holds
    them. Compiled by Triton 3.9 for sm_90 the pass has 97 registers instead of 127 at D = 256, and 126 instead of 155 at D = 512,
    where two blocks then fit; at D <= 128 the number stays.
    """
    shared = {8: 163 if capability[1] == 0 else 99, 9: 227, 10: 227}.get(capability[0], 99)  # KiB that a block may have
    d_pad = max(16, triton.next_power_of_2(D)) if D <= 256 else -(-D // 64) * 64
    whole = Configuration(d_pad, d_pad, 128, 128, 8, 3, capability >= (9, 0))
    if d_pad <= 64:
        return whole  # 16 KiB of rows and at most 3 stages of 16 KiB: two blocks fit in 227 KiB and in 163
    if d_pad == 128 and shared >= 163:
        # 32 KiB of rows and 32 a stage. Two blocks fit in 227 KiB with two stages; registers allow sm_80 one block anyway.
        return whole._replace(num_stages=2 if shared == 227 else 3)
    if d_pad == 256 and shared == 227:
        return whole._replace(num_stages=2)  # 64 KiB of rows and 64 a stage: 192 KiB, a third stage would be too many
    if d_pad == 256 and shared == 163:
        return whole._replace(block_k=64)  # 64 KiB of rows and 32 a stage: 128 KiB with two in flight
    return whole._replace(block_d=64)  # both sides in pieces of 64 components, 32 KiB a stage: at most 96 KiB


def splits(N: int, heads: int, chunks: int, block_n: int, multiprocessors: int) -> int:
    """Into how many ranges of chunks the codebook is cut: enough programs to fill the chip, and no range without a chunk."""
    blocks = heads * -(-N // block_n)
    wanted = max(1, min(chunks, PROGRAMS_PER_SM * multiprocessors // blocks))
    return -(-chunks // -(-chunks // wanted))


@functools.cache
def chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Capability and number of multiprocessors. The interpreter plays a small sm_90."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < OLDEST:
        raise RuntimeError(
            f"the Triton lookup needs compute capability 8.0, {properties.name} has {properties.major}.{properties.minor};"
            ' use_backend("reference") serves it'
        )
    return (properties.major, properties.minor), properties.multi_processor_count


class PackedCodes(NamedTuple):
    """Codebooks (H, K, D) as the pass reads them, and what its bounds take from them."""

    k_pad: int
    tiles: int
    tiles_per_chunk: int
    parts: int
    mean: Tensor  # (H, D)
    head: Tensor  # (H, STATISTICS)
    part_largest: Tensor  # (H, parts)
    packed: Tensor  # (H, k_pad, d_pad), fp16
    half_squares: Tensor  # (H, k_pad), fp32
    norms: Tensor  # (H, k_pad)
    left_out: Tensor  # (H, k_pad)
    chunk_bounds: Tensor  # (H, chunks, 2)

    def tiles_of(self, c: Configuration) -> Tensor | TensorDescriptor:
        """What the pass takes for `codes`."""
        if not self.by_descriptor(c):
            return self.packed
        return TensorDescriptor.from_tensor(self.packed.view(-1, c.d_pad), [c.block_k, c.block_d])

    def by_descriptor(self, c: Configuration) -> bool:
        return c.descriptors and len(self.packed) * self.k_pad <= MAX_COORDINATE


def pack_codebooks(codes: Tensor, metric: str, c: Configuration) -> PackedCodes:
    """codes (H, K, D), H <= MAX_HEADS: four launches, whatever H is."""
    heads, K, D = codes.shape
    tiles = triton.cdiv(K, c.block_k)
    tiles_per_chunk = triton.cdiv(tiles, MAX_CHUNKS)
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    k_pad, codes_per_chunk, parts = tiles * c.block_k, tiles_per_chunk * c.block_k, triton.cdiv(K, prepare.CODES.value)

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codes.device)

    squares, centred, mean = new(heads, K), new(heads, K), new(heads, D)
    sums, statistics, part_largest = new(heads, parts, D), new(heads, parts, prepare.STATISTICS.value), new(heads, parts)
    head, chunk_bounds = new(heads, prepare.STATISTICS.value), new(heads, chunks, 2)
    packed, half_squares = new(heads, k_pad, c.d_pad, dtype=torch.float16), new(heads, k_pad, dtype=torch.float32)
    norms, left_out = new(heads, k_pad), new(heads, k_pad)
    block_d = min(64, c.d_pad)
    book = (codes, *codes.stride())
    prepare.sum_codes[parts, heads](
        *book, squares, sums, statistics, K, D, parts,
        METRIC=metric, WIDE=codes.dtype == torch.float64, BLOCK_D=block_d, **PREPARING,
    )  # fmt: skip
    prepare.mean_code[triton.cdiv(D, 16), heads](sums, statistics, mean, head, D, parts, BLOCK_D=16, **PREPARING)
    prepare.centred_norms[parts, heads](
        *book, squares, mean, head, centred, part_largest, K, D, parts, METRIC=metric, BLOCK_D=block_d, **PREPARING
    )
    prepare.pack_codes[chunks, heads](
        *book, squares, mean, head, centred, part_largest, packed, half_squares, norms, left_out, chunk_bounds,
        K, k_pad, D, parts, chunks, codes_per_chunk, METRIC=metric, D_PAD=c.d_pad, BLOCK_D=block_d, **PREPARING,
    )  # fmt: skip
    return PackedCodes(
        k_pad, tiles, tiles_per_chunk, parts, mean, head, part_largest, packed, half_squares, norms, left_out, chunk_bounds
    )


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str) -> Tensor:
    """Launcher of the operator. "fast" is answered exactly: a pass in fp16 alone would not keep what it promises, and the fp64
    evaluations that the bound leaves are few."""
    rows, codes, heads = with_heads(x, codebook)  # (H, N, D), (H, K, D)
    N, D, K = rows.shape[1], rows.shape[2], codes.shape[1]
    indices = torch.empty(heads, N, dtype=torch.int64, device=x.device)
    if indices.numel() == 0:
        return indices.view(x.shape[:-1])
    if heads > MAX_HEADS:
        parts = [slice(h, h + MAX_HEADS) for h in range(0, heads, MAX_HEADS)]
        return torch.cat([nearest_code(x[p], codebook[p], None if mask is None else mask[p], metric, precision) for p in parts])
    capability, multiprocessors = chip(x.device)
    c = configuration(D, capability)
    valid = None if mask is None else mask.reshape(heads, N).view(torch.uint8)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        book = pack_codebooks(codes, metric, c)
        chunks = book.chunk_bounds.shape[1]
        cuts = splits(N, heads, chunks, c.block_n, multiprocessors)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(heads, *shape, dtype=dtype, device=x.device)

        packed_rows, ratios = new(N, c.d_pad, dtype=torch.float16), new(N, dtype=torch.float32)
        row_bounds, minima = new(N, 2, dtype=torch.float64), new(chunks, N, dtype=torch.float32)
        block_d = min(64, c.d_pad)
        prepare.pack_rows[triton.cdiv(N, prepare.CODES.value), heads](
            rows, *rows.stride(), book.mean, book.head, book.part_largest, packed_rows, ratios, row_bounds, N, D, book.parts,
            METRIC=metric, D_PAD=c.d_pad, BLOCK_D=block_d, **PREPARING,
        )  # fmt: skip
        search.sweep[heads * triton.cdiv(N, c.block_n), cuts](
            packed_rows, book.tiles_of(c), book.half_squares, ratios, minima,
            N, book.k_pad, book.tiles, book.tiles_per_chunk, chunks, triton.cdiv(chunks, cuts),
            DESCRIPTORS=book.by_descriptor(c), D_PAD=c.d_pad, BLOCK_D=c.block_d, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
            **c.options(),
        )  # fmt: skip
        search.settle[N, heads](
            rows, *rows.stride(), codes, *codes.stride(), valid, *((0, 0) if valid is None else valid.stride()),
            packed_rows, row_bounds, ratios, book.packed, book.half_squares, book.norms, book.left_out, book.chunk_bounds,
            book.head, minima, indices, N, K, book.k_pad, D, chunks, book.tiles_per_chunk * c.block_k,
            METRIC=metric, HAS_MASK=valid is not None, D_PAD=c.d_pad, BLOCK_D=block_d, **SETTLING,
        )  # fmt: skip
    return indices.view(x.shape[:-1])


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, beta: float, legacy_beta: bool, gradient: str, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of the operator: the lookup here, gather and losses in plain PyTorch, like the backward."""
    indices = nearest_code(x, codebook, mask, metric, precision)
    return reference.quantize(x, codebook, indices, beta, legacy_beta, gradient)
