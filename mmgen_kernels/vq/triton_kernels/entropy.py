"""code_entropy on NVIDIA GPUs: preparation and second stages in PyTorch, sweeps in Triton. Nothing is looked at on the host."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmgen_kernels.vq import reference
from mmgen_kernels.vq.reference import entropy as plain
from mmgen_kernels.vq.reference import with_heads
from mmgen_kernels.vq.triton_kernels import entropy_sweeps as sweeps
from mmgen_kernels.vq.triton_kernels.nearest_code import MAX_HEADS, chip

MAX_RANGES = 16  # of codes that a row's sums are kept for, hence copies of a row's gradient
PROGRAMS = 512  # wanted of a sweep whose programs belong to codes
MAX_ROW_RANGES = 8  # copies of a code's gradient


class Configuration(NamedTuple):
    block_n: int
    block_k: int
    block_d: int
    block_out: int  # columns of a gradient that a program adds up
    num_warps: int

    def options(self) -> dict[str, Any]:
        """No fused multiply-add but that of tl.dot: it would undo the reduction of exponents."""
        return {"enable_fp_fusion": False, "num_warps": self.num_warps, "num_stages": 1, "maxnreg": 240}


@functools.cache
def configuration(D: int) -> Configuration:
    """Depends on D only. Tiles of 64 rows by 64 codes spill in the gradients' sweeps on sm_80, whose products of fp32 the compiler
    unrolls whole: 144 loads and stores at D = 64, compiled by Triton 3.9. With 32 rows it is 150 registers and none."""
    d_pad = max(16, triton.next_power_of_2(D))
    return Configuration(32, 64, 16, min(64, d_pad), 8)


def ranges_of(tiles: int, wanted: int) -> tuple[int, int]:
    """`tiles` in at most `wanted` ranges: tiles per range, and ranges; none is empty."""
    per_range = -(-tiles // max(1, min(tiles, wanted)))
    return per_range, -(-tiles // per_range)


class Prepared:
    """Rows and codes in fp32 as the sweeps read them, and how the sweeps are cut."""

    def __init__(self, x: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float, metric: str):
        rows, codes, self.heads = with_heads(x, codebook)  # (H, N, D), (H, K, D)
        self.N, self.D, self.K = rows.shape[1], rows.shape[2], codes.shape[1]
        self.valid = plain.valid_rows(mask, rows)  # (H, N)
        self.scale = (2 if metric == "l2" else 1) / temperature
        of_heads = [plain.prepared_codes(c, metric, temperature) for c in codes]
        self.codes = torch.stack([c for c, *_ in of_heads]).float()  # (H, K, D), times `scale`
        offsets = [torch.as_tensor(o, dtype=torch.float64, device=x.device).expand(self.K) for _, o, *_ in of_heads]
        self.offsets = torch.stack(offsets).float()  # (H, K)
        scales, means = ([t for t in some if t is not None] for some in ((s for _, _, s, _ in of_heads), (m for *_, m in of_heads)))
        self.code_scales = torch.stack(scales) if scales else None  # (H, K, 1), cosine
        mean = torch.stack(means)[:, None] if means else None  # (H, 1, D), l2
        prepared, self.row_scales = plain.prepared(torch.where(self.valid[..., None], rows, 0), metric, mean)
        self.rows = prepared.float().contiguous()  # (H, N, D)
        self.c = configuration(self.D)
        self.tiles, self.blocks = triton.cdiv(self.K, self.c.block_k), triton.cdiv(self.N, self.c.block_n)
        # by K alone: a row's sums may not depend on the rows around it
        self.per_range, self.ranges = ranges_of(self.tiles, MAX_RANGES)
        wanted = min(MAX_ROW_RANGES, triton.cdiv(PROGRAMS, self.tiles * self.heads))
        self.blocks_per_range, self.row_ranges = ranges_of(self.blocks, wanted)
        self.blocks_of = {"BLOCK_N": self.c.block_n, "BLOCK_K": self.c.block_k, "BLOCK_D": self.c.block_d, **self.c.options()}

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.rows.device)

    def on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.rows.device) if self.rows.is_cuda else contextlib.nullcontext()

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.codes, self.offsets


def served_by_reference(x: Tensor, codebook: Tensor) -> bool:
    """fp64, which the sweeps do not have, and sizes without work."""
    heads = codebook.shape[0] if codebook.dim() == 3 else 1
    return torch.float64 in (x.dtype, codebook.dtype) or x.numel() == 0 or heads > MAX_HEADS


def code_entropy(
    x: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float, metric: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launcher of the operator; fp64 input takes the reference's way."""
    if served_by_reference(x, codebook):
        return reference.code_entropy(x, codebook, mask, temperature, metric, eps)
    chip(x.device)  # refuses what is too old
    p = Prepared(x, codebook, mask, temperature, metric)
    found = p.new(p.heads, 3, p.ranges, p.N)
    with p.on_device():
        sweeps.reduce_codes[p.blocks, p.ranges, p.heads](
            *p.inputs(), found, p.N, p.K, p.D, p.tiles, p.per_range, p.ranges, **p.blocks_of
        )
    each, totals, weighted = found.double().unbind(1)  # (H, ranges, N)
    largest = each.amax(1)  # (H, N)
    rise = largest[:, None] - each
    shrink = (-rise).exp()
    total = (shrink * totals).sum(1)
    mean_below = (shrink * (weighted - rise * totals)).sum(1) / total
    largest, total, mean_below = (torch.where(p.valid, v, i) for v, i in ((largest, 0.0), (total, 1.0), (mean_below, 0.0)))
    most = torch.where(p.valid, largest, sweeps.NOWHERE.value).float()
    sums = p.new(p.heads, p.row_ranges, p.K)
    with p.on_device():
        sweeps.add_probabilities[p.tiles, p.row_ranges, p.heads](
            *p.inputs(), most, (1 / total).float(), sums, p.N, p.K, p.D, p.blocks, p.blocks_per_range, p.row_ranges, **p.blocks_of
        )
    q = sums.sum(1, dtype=torch.float64)  # (H, K)
    everything = q.sum(1, keepdim=True)
    q = q / torch.where(everything == 0, 1, everything)
    mean_entropy = torch.where(q == 0, 0, -q * (q + eps).log()).sum(1)
    return (
        (total.log() - mean_below).view(x.shape[:-1]).float(),
        mean_entropy.view(codebook.shape[:-2]).float(),
        torch.stack((largest, total, mean_below), -1).view(*x.shape[:-1], 3),
        q.view(codebook.shape[:-1]).float(),
    )


def code_entropy_backward(
    grad_sample_entropy: Tensor | None,
    grad_mean_entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    softmax_terms: Tensor,
    mean_probability: Tensor,
    temperature: float,
    metric: str,
    eps: float,
    need_grad_x: bool,
    need_grad_codebook: bool,
) -> tuple[Tensor, Tensor]:
    if served_by_reference(x, codebook):
        return reference.code_entropy_backward(
            grad_sample_entropy, grad_mean_entropy, x, codebook, mask, softmax_terms, mean_probability, temperature, metric, eps,
            need_grad_x, need_grad_codebook,
        )  # fmt: skip
    p = Prepared(x, codebook, mask, temperature, metric)
    largest, total, mean_below = softmax_terms.reshape(p.heads, p.N, 3).unbind(-1)
    most = torch.where(p.valid, largest, sweeps.NOWHERE.value).float()
    slope = torch.zeros_like(most) if grad_sample_entropy is None else -grad_sample_entropy.float().reshape(p.heads, p.N)
    constant = torch.zeros_like(most)
    weights = torch.zeros_like(p.offsets)  # (H, K)
    if grad_mean_entropy is not None:
        weights = plain.weights_of(
            mean_probability.reshape(p.heads, p.K), p.valid.sum(1), grad_mean_entropy.reshape(p.heads), eps
        ).float()
        found = p.new(p.heads, p.ranges, p.N)
        with p.on_device():
            sweeps.add_weighted[p.blocks, p.ranges, p.heads](
                *p.inputs(), most, weights, found, p.N, p.K, p.D, p.tiles, p.per_range, p.ranges, **p.blocks_of
            )
        constant = (-found.sum(1, dtype=torch.float64) / total).float()
    terms = torch.stack((most, (1 / total).float(), mean_below.float(), slope, constant), 1)  # (H, 5, N)
    columns = triton.cdiv(p.D, p.c.block_out)
    grad_x, grad_codebook = x.new_empty(0), codebook.new_empty(0)
    if need_grad_x:
        found, sums = p.new(p.heads, p.ranges, p.N, p.D), p.new(p.heads, p.ranges, p.N)
        with p.on_device():
            sweeps.gradients_of_rows[p.blocks, p.ranges * columns, p.heads](
                *p.inputs(), terms, weights, found, sums, p.N, p.K, p.D, p.tiles, p.per_range, p.ranges, columns,
                BLOCK_OUT=p.c.block_out, **p.blocks_of,
            )  # fmt: skip
        to_rows = found.sum(1, dtype=torch.float64)  # (H, N, D)
        if metric == "l2":  # G adds up to 0 but for roundings, of which x - c is not made
            to_rows -= p.scale * sums.sum(1, dtype=torch.float64)[..., None] * p.rows
        if metric == "cosine":
            to_rows = plain.across(to_rows, p.rows, p.row_scales)
        grad_x = torch.where(p.valid[..., None], to_rows, 0).view(x.shape).to(x.dtype)
    if need_grad_codebook:
        found, sums = p.new(p.heads, p.row_ranges, p.K, p.D), p.new(p.heads, p.row_ranges, p.K)
        with p.on_device():
            sweeps.gradients_of_codes[p.tiles, p.row_ranges * columns, p.heads](
                *p.inputs(), terms, weights, found, sums, p.N, p.K, p.D, p.blocks, p.blocks_per_range, p.row_ranges, columns,
                BLOCK_OUT=p.c.block_out, **p.blocks_of,
            )  # fmt: skip
        to_codes = found.sum(1, dtype=torch.float64) * p.scale  # (H, K, D)
        if metric == "l2":  # p.codes holds the scale already
            to_codes -= sums.sum(1, dtype=torch.float64)[..., None] * p.codes
        if metric == "cosine":
            to_codes = plain.across(to_codes, p.codes * temperature, p.code_scales)
        grad_codebook = to_codes.view(codebook.shape).to(codebook.dtype)
    return grad_x, grad_codebook
