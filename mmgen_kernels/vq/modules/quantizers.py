"""One codebook, or one per head: VectorQuantizer and EMAVectorQuantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgen_kernels.philox.ops import fold_in
from mmgen_kernels.vq.modules.ranks import added_over_ranks, gathered, sum_dtype
from mmgen_kernels.vq.modules.usage import CodeUsage, counts_of, usage_of
from mmgen_kernels.vq.ops import (
    VQOutput,
    code_statistics,
    gather_codes,
    kmeans,
    replace_dead_codes_,
    update_codebook_ema_,
    vector_quantize,
)


class Quantizer(nn.Module):
    """What the quantizers share: layout of x, usage of codes, codes of indices.

    A subclass holds ``self.codebook``, (K, D) or (H, K, D).
    """

    codebook: Tensor
    batch_counts: Tensor
    epoch_counts: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        heads: int | None = None,
        channel_dim: int = -1,
        normalize: bool = False,
        beta: float = 0.25,
        legacy_beta: bool = False,
        gradient: str = "straight_through",
        metric: str = "l2",
        precision: str = "exact",
    ):
        super().__init__()
        if heads is not None and dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim = {dim} and heads = {heads}")
        self.num_codes, self.dim, self.heads, self.channel_dim, self.normalize = num_codes, dim, heads, channel_dim, normalize
        self.beta, self.legacy_beta, self.gradient, self.metric, self.precision = beta, legacy_beta, gradient, metric, precision
        shape = (num_codes,) if heads is None else (heads, num_codes)
        # of the last batch and since `reset_usage`: not part of a checkpoint
        self.register_buffer("batch_counts", torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.register_buffer("epoch_counts", torch.zeros(shape, dtype=torch.int64), persistent=False)

    def quantize(self, rows: Tensor, mask: Tensor | None) -> VQOutput:
        return vector_quantize(
            rows, self.codes(), beta=self.beta, legacy_beta=self.legacy_beta, gradient=self.gradient,
            metric=self.metric, precision=self.precision, mask=mask,
        )  # fmt: skip

    def in_layout(self, out: VQOutput) -> VQOutput:
        indices = out.indices if self.heads is None else out.indices.movedim(0, -1)
        return out._replace(quantized=self.to_layout(out.quantized), indices=indices)

    def codebook_shape(self) -> tuple[int, ...]:
        return (self.num_codes, self.dim) if self.heads is None else (self.heads, self.num_codes, self.dim // self.heads)

    def to_rows(self, x: Tensor) -> Tensor:
        """(..., D), or (H, ..., D / H): channels last, heads first, on the unit sphere if asked for."""
        if x.shape[self.channel_dim] != self.dim:
            raise ValueError(f"x must have {self.dim} channels in dimension {self.channel_dim}, got shape {tuple(x.shape)}")
        rows = x.movedim(self.channel_dim, -1)
        if self.heads is not None:
            rows = rows.unflatten(-1, (self.heads, -1)).movedim(-2, 0)
        return F.normalize(rows, dim=-1) if self.normalize else rows

    def to_layout(self, rows: Tensor) -> Tensor:
        """The way back."""
        if self.heads is not None:
            rows = rows.movedim(0, -2).flatten(-2)
        return rows.movedim(-1, self.channel_dim)

    def to_mask(self, mask: Tensor | None) -> Tensor | None:
        return mask if mask is None or self.heads is None else mask.expand(self.heads, *mask.shape)

    def codes(self) -> Tensor:
        """The codebook as rows see it."""
        return F.normalize(self.codebook, dim=-1) if self.normalize else self.codebook

    def codes_to_embedding(self, indices: Tensor) -> Tensor:
        """The codes of indices, in x's layout: (...), with heads (..., H), to x's shape. Index -1 (masked) gives 0."""
        if self.heads is not None:
            indices = indices.movedim(-1, 0)
        return self.to_layout(gather_codes(self.codes(), indices))

    @torch.no_grad()
    def count(self, counts: Tensor) -> None:
        self.batch_counts.copy_(counts)
        self.epoch_counts.add_(counts)

    def batch_usage(self) -> CodeUsage:
        """Of the last batch seen in training mode."""
        return usage_of(self.batch_counts)

    def epoch_usage(self) -> CodeUsage:
        """Of all batches seen in training mode since `reset_usage`."""
        return usage_of(self.epoch_counts)

    def reset_usage(self) -> None:
        """Begins an epoch."""
        self.batch_counts.zero_()
        self.epoch_counts.zero_()

    @torch.no_grad()
    def initialize(self, x: Tensor, key: Tensor, *, iterations: int = 10) -> None:
        """Starts from the k-means centres of x, all ranks' x together. To be called once, on a first batch."""
        rows = gathered(self.to_rows(x).flatten(0 if self.heads is None else 1, -2), dim=-2)
        metric = "cosine" if self.normalize else "l2"
        self.start_from(*kmeans(rows, self.num_codes, key, iterations=iterations, metric=metric, heads=self.heads is not None))

    def start_from(self, codebook: Tensor, counts: Tensor) -> None:
        self.codebook.copy_(codebook)

    def extra_repr(self) -> str:
        heads = "" if self.heads is None else f", heads={self.heads}"
        return f"num_codes={self.num_codes}, dim={self.dim}{heads}"


class VectorQuantizer(Quantizer):
    """A codebook that learns by the gradient of the codebook loss: `mk.vector_quantize` as a module.

    Args:
        num_codes: K.
        dim: of x; each of ``heads`` codebooks has ``dim / heads`` of it.
        heads: number of codebooks, each for its part of the channels; None: one codebook (K, D), without a dimension for heads.
        channel_dim: where x has its channels: -1, or 1 for images (B, D, H, W).
        normalize: rows and codes are put on the unit sphere, as in ViT-VQGAN and LlamaGen.
        beta, legacy_beta, gradient, metric, precision: as in `mk.vector_quantize`.

    Shape:
        x of any rank with ``dim`` channels; mask (...) without the channels. Returns VQOutput with ``quantized`` of x's shape and
        ``indices`` (...), with heads (..., H).

    Raises:
        TypeError, ValueError: as `mk.vector_quantize`; or heads does not divide dim, or x has not ``dim`` channels.

    NaN: as in `mk.vector_quantize`.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017.
    """

    def __init__(self, num_codes: int, dim: int, **options: Any):
        super().__init__(num_codes, dim, **options)
        self.codebook = nn.Parameter(initial_codes(self.codebook_shape(), self.normalize))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> VQOutput:
        out = self.quantize(self.to_rows(x), self.to_mask(mask))
        if self.training:
            self.count(added_over_ranks(counts_of(out.indices, self.num_codes, self.heads is not None)))
        return self.in_layout(out)


class EMAVectorQuantizer(Quantizer):
    """A codebook that follows the moving averages of its rows; the loss is ``beta`` times the commitment loss alone.

    In training mode each forward adds its rows' counts and sums, over all ranks, to the averages and moves the codebook, after
    the lookup: what it returns comes of the codebook before. Ranks hold the same codebook afterwards, and the bits that one process
    with all their rows would hold: sums travel in fp64 and are rounded once.

    Args:
        num_codes, dim, heads, channel_dim, normalize, beta, gradient, metric, precision: as in VectorQuantizer.
        decay, eps: of the averages and of the Laplace smoothing, as in `mk.update_codebook_ema_`.
        dead_code_threshold: codes whose moving average of rows per batch falls below it start again from a random row
            (`mk.replace_dead_codes_`); 0: never. With several ranks their rows are gathered for it, and every rank must have
            the same number of them.
        seed: of the random rows. Same seed, same data: same bits.

    Shape, Raises:
        as VectorQuantizer.

    NaN: as in `mk.vector_quantize`; in training mode a row that holds one makes the code that it chose NaN, for good: mask it.

    Source: van den Oord et al. 2017, appendix A.1.
    """

    cluster_size: Tensor
    code_sum: Tensor
    key: Tensor
    step: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        dead_code_threshold: float = 0.0,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(num_codes, dim, **options)
        self.decay, self.eps, self.dead_code_threshold = decay, eps, dead_code_threshold
        codebook = initial_codes(self.codebook_shape(), self.normalize)
        self.register_buffer("codebook", codebook)
        self.register_buffer("cluster_size", torch.ones(codebook.shape[:-1]))
        self.register_buffer("code_sum", codebook.clone())
        self.register_buffer("key", torch.tensor([seed, 0]))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def codes(self) -> Tensor:
        return self.codebook  # kept on the sphere by the update

    def forward(self, x: Tensor, mask: Tensor | None = None) -> VQOutput:
        rows, valid = self.to_rows(x), self.to_mask(mask)
        out = self.quantize(rows, valid)
        if self.training:
            self.follow(rows.detach(), out.indices, valid)
        return self.in_layout(out._replace(loss=self.beta * out.commitment_loss))

    @torch.no_grad()
    def follow(self, rows: Tensor, indices: Tensor, mask: Tensor | None) -> None:
        """One step of the averages, of the codebook, and of codes that are dead after it."""
        counts, sums = code_statistics(rows, indices, self.num_codes, heads=self.heads is not None, dtype=sum_dtype(self.code_sum))
        counts, sums = added_over_ranks(counts), added_over_ranks(sums)
        self.count(counts)
        averages = self.codebook, self.cluster_size, self.code_sum
        rounded = sums.to(self.code_sum.dtype)
        update_codebook_ema_(*averages, counts, rounded, decay=self.decay, eps=self.eps, normalize=self.normalize)
        if self.dead_code_threshold > 0:
            first = 0 if self.heads is None else 1
            everywhere = gathered(rows.flatten(first, -2), dim=-2)
            valid = None if mask is None else gathered(mask.flatten(first), dim=-1)
            key = fold_in(self.key, self.step)
            threshold = self.dead_code_threshold
            replace_dead_codes_(*averages, everywhere, key, threshold=threshold, normalize=self.normalize, mask=valid)
        self.step.add_(1)

    def _apply(self, fn: Callable, recurse: bool = True) -> EMAVectorQuantizer:
        keep_wide(self, ("codebook", "cluster_size", "code_sum"), lambda: super(EMAVectorQuantizer, self)._apply(fn, recurse))
        return self

    def start_from(self, codebook: Tensor, counts: Tensor) -> None:
        self.codebook.copy_(codebook)
        self.cluster_size.copy_(counts.clamp(min=1))
        self.code_sum.copy_(self.codebook * self.cluster_size[..., None])


def initial_codes(shape: tuple[int, ...], normalize: bool) -> Tensor:
    """Standard normal, as latents are; on the sphere if the codes live there."""
    codes = torch.randn(shape)
    return F.normalize(codes, dim=-1) if normalize else codes


def keep_wide(module: nn.Module, names: tuple[str, ...], apply: Callable[[], object]) -> None:
    """Averages stay in fp32 or better when the model goes to half precision: (1 - decay) times a row would vanish beside them."""
    before = {name: module.get_buffer(name) for name in names}
    apply()
    for name, wide in before.items():
        after = module.get_buffer(name)
        if after.dtype.itemsize < 4:
            setattr(module, name, wide.to(after.device))
