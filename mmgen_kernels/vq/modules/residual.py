"""Codebooks one after the other: ResidualVectorQuantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmgen_kernels.philox.ops import fold_in, philox_uniform
from mmgen_kernels.vq.modules.quantizers import initial_codes, keep_wide
from mmgen_kernels.vq.modules.ranks import added_over_ranks, gathered, several_ranks, sum_dtype
from mmgen_kernels.vq.modules.usage import CodeUsage, counts_of, usage_of
from mmgen_kernels.vq.ops import RVQOutput, gather_codes, kmeans, replace_dead_codes_, residual_quantize, update_codebook_ema_


class ResidualVectorQuantizer(nn.Module):
    """Levels of codebooks, each for what the levels before it left over: SoundStream, EnCodec, DAC, RQ-VAE.

    Args:
        num_levels: L.
        num_codes: K, or one number per level.
        dim: D, of x.
        shared: all levels use one codebook.
        ema: codebooks follow moving averages (EnCodec), after each forward in training mode, over all ranks as in
            EMAVectorQuantizer; the loss is then ``beta`` times the commitment loss alone. False: they learn by the gradient of
            the codebook loss (DAC).
        decay, eps, dead_code_threshold: of the averages, as in EMAVectorQuantizer.
        level_dropout: in training mode, the share of samples that use only the first 1 .. L levels, each number as likely
            (DAC: 0.5). A sample is an element of x's first dimension.
        seed: of dropped levels and of the rows that dead codes take. Same seed, same data: same bits.
        channel_dim: where x has its channels: -1, or 1 for audio (B, D, T) and images.
        beta, gradient, metric, precision: as in `mk.residual_quantize`.

    Shape:
        x of any rank with ``dim`` channels, mask (...) without them. Returns RVQOutput with ``quantized`` of x's shape, ``indices``
        (..., L) and ``loss`` (L,).

    Raises:
        TypeError, ValueError: as `mk.residual_quantize`; or num_codes are not one or num_levels numbers, or not one if shared,
            level_dropout is not in 0..1, or x has not ``dim`` channels.

    NaN: as in `mk.residual_quantize`; with ``ema``, in training mode, the codes that a row with one chose become NaN, for good.

    Source: Zeghidour et al., SoundStream, 2021; Defossez et al., High Fidelity Neural Audio Compression, 2022; Kumar et al.,
    High-Fidelity Audio Compression with Improved RVQGAN, 2023.
    """

    codebooks: Tensor
    cluster_size: Tensor
    code_sum: Tensor
    batch_counts: Tensor
    epoch_counts: Tensor
    key: Tensor
    step: Tensor

    def __init__(
        self,
        num_levels: int,
        num_codes: int | Sequence[int],
        dim: int,
        *,
        shared: bool = False,
        ema: bool = True,
        decay: float = 0.99,
        eps: float = 1e-5,
        dead_code_threshold: float = 0.0,
        level_dropout: float = 0.0,
        seed: int = 0,
        channel_dim: int = -1,
        beta: float = 0.25,
        gradient: str = "straight_through",
        metric: str = "l2",
        precision: str = "exact",
    ):
        super().__init__()
        sizes = [num_codes] * num_levels if isinstance(num_codes, int) else list(num_codes)
        if len(sizes) != num_levels or num_levels < 1:
            raise ValueError(f"num_codes must be an int or one number for each of num_levels = {num_levels}, got {num_codes}")
        if shared and len(set(sizes)) > 1:
            raise ValueError(f"num_codes must be one number if shared, got {num_codes}")
        if not 0 <= level_dropout <= 1:
            raise ValueError(f"level_dropout must be 0 to 1, got {level_dropout}")
        self.sizes, self.dim, self.shared, self.ema, self.channel_dim = sizes, dim, shared, ema, channel_dim
        self.decay, self.eps, self.dead_code_threshold, self.level_dropout = decay, eps, dead_code_threshold, level_dropout
        self.beta, self.gradient, self.metric, self.precision = beta, gradient, metric, precision
        # levels one behind the other, whatever their sizes
        codes = initial_codes((sizes[0] if shared else sum(sizes), dim), normalize=False)
        if ema:
            self.register_buffer("codebooks", codes)
            self.register_buffer("cluster_size", torch.ones(len(codes)))
            self.register_buffer("code_sum", codes.clone())
        else:
            self.codebooks = nn.Parameter(codes)
        self.register_buffer("key", torch.tensor([seed, 0]))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # of the last batch and since `reset_usage`: not part of a checkpoint
        self.register_buffer("batch_counts", torch.zeros(sum(sizes), dtype=torch.int64), persistent=False)
        self.register_buffer("epoch_counts", torch.zeros(sum(sizes), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | Tensor | None = None) -> RVQOutput:
        """levels: as in `mk.residual_quantize`; by default all, or in training mode what ``level_dropout`` draws."""
        if x.shape[self.channel_dim] != self.dim:
            raise ValueError(f"x must have {self.dim} channels in dimension {self.channel_dim}, got shape {tuple(x.shape)}")
        rows = x.movedim(self.channel_dim, -1)
        follows = self.training and self.ema
        if self.training and levels is None and self.level_dropout > 0:
            levels = self.drawn_levels(len(x))
        # the operator keeps its codebooks for the backward, before which the averages are about to move them
        given = self.codebooks.clone() if follows else self.codebooks
        out = residual_quantize(
            rows, self.per_level(given), beta=self.beta, gradient=self.gradient, metric=self.metric, levels=levels, mask=mask,
            precision=self.precision, statistics=sum_dtype(self.code_sum) if follows else False,
        )  # fmt: skip
        if follows:
            self.follow(rows.detach(), given, out, mask)
        elif self.training:
            self.count([counts_of(out.indices[..., level], size, False) for level, size in enumerate(self.sizes)])
        if self.training:
            self.step.add_(1)
        loss = out.loss
        if self.ema:  # its value without the codebook loss, which has no gradient here
            loss = loss - (loss / (1 + self.beta)).detach()
        return RVQOutput(out.quantized.movedim(-1, self.channel_dim), out.indices, loss, None, None)

    def per_level(self, codebooks: Tensor) -> Tensor | list[Tensor]:
        """As `mk.residual_quantize` takes them: (L, K, D), expanded if shared; a list where sizes differ."""
        if self.shared:
            return codebooks.expand(len(self.sizes), -1, -1)
        if len(set(self.sizes)) == 1:
            return codebooks.view(len(self.sizes), self.sizes[0], self.dim)
        return list(codebooks.split(self.sizes))

    def codes_to_embedding(self, indices: Tensor) -> Tensor:
        """The sum of the codes of indices (..., l), l <= L levels, in x's layout. Index -1 (masked, dropped) adds nothing."""
        books = self.per_level(self.codebooks)
        total = gather_codes(books[0], indices[..., 0])
        for level in range(1, indices.shape[-1]):
            total = total + gather_codes(books[level], indices[..., level])
        return total.movedim(-1, self.channel_dim)

    def batch_usage(self) -> CodeUsage:
        """Of the last batch seen in training mode; one number per level (L,)."""
        return self.usage(self.batch_counts)

    def epoch_usage(self) -> CodeUsage:
        """Of all batches seen in training mode since `reset_usage`; one number per level (L,)."""
        return self.usage(self.epoch_counts)

    def reset_usage(self) -> None:
        """Begins an epoch."""
        self.batch_counts.zero_()
        self.epoch_counts.zero_()

    @torch.no_grad()
    def initialize(self, x: Tensor, key: Tensor, *, iterations: int = 10) -> None:
        """Starts each level from the k-means centres of what the levels before it leave of x, all ranks' x together; a shared
        codebook from those of x. To be called once, on a first batch."""
        rows = gathered(x.movedim(self.channel_dim, -1).flatten(0, -2), dim=0).to(self.codebooks.dtype)
        counts = []
        for level, codes in enumerate(self.codebooks.split(len(self.codebooks) if self.shared else self.sizes)):
            centres, count = kmeans(rows, len(codes), fold_in(key, level), iterations=iterations)
            codes.copy_(centres)
            counts.append(count)
            rows = rows - residual_quantize(rows, codes[None]).quantized
        if self.ema:
            self.cluster_size.copy_(torch.cat(counts).clamp(min=1))
            self.code_sum.copy_(self.codebooks * self.cluster_size[:, None])

    # -- training -----------------------------------------------------------------------------------------------------

    def drawn_levels(self, batch: int) -> Tensor:
        """How many levels each sample uses (B,). A rank draws its part of what one process would."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if several_ranks() else (1, 0)
        key = fold_in(fold_in(self.key, self.step), len(self.sizes))
        cut, depth = philox_uniform((2, world * batch), key)[:, rank * batch : (rank + 1) * batch]
        drawn = 1 + (depth * len(self.sizes)).long()
        return torch.where(cut < self.level_dropout, drawn, len(self.sizes))

    @torch.no_grad()
    def follow(self, rows: Tensor, before: Tensor, out: RVQOutput, mask: Tensor | None) -> None:
        """One step of the averages, of the codebooks, and of codes that are dead after it."""
        counts, sums = as_levels(out.counts), as_levels(out.sums)
        flat_counts, flat_sums = added_over_ranks(torch.cat(counts)), added_over_ranks(torch.cat(sums))
        self.count(list(flat_counts.split(self.sizes)))
        if self.shared:
            shape = (len(self.sizes), self.sizes[0])
            flat_counts, flat_sums = flat_counts.view(shape).sum(0), flat_sums.view(*shape, self.dim).sum(0)
        averages = list(zip(*(t.split(len(t) if self.shared else self.sizes) for t in self.averages()), strict=True))
        parts = len(flat_counts) if self.shared else self.sizes
        for (codes, size, total), count, added in zip(averages, flat_counts.split(parts), flat_sums.split(parts), strict=True):
            update_codebook_ema_(codes, size, total, count, added.to(total.dtype), decay=self.decay, eps=self.eps)
        if self.dead_code_threshold > 0:
            self.revive(rows, self.per_level(before), out.indices, averages)

    def averages(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codebooks, self.cluster_size, self.code_sum

    def revive(self, rows: Tensor, before: Tensor | list[Tensor], indices: Tensor, averages: list[tuple[Tensor, ...]]) -> None:
        """Dead codes of a level take what the levels before it left of a row that reached it; those of a shared codebook, rows
        of x."""
        key = fold_in(self.key, self.step)
        residual = rows.to(self.codebooks.dtype)
        for level, (codes, cluster_size, code_sum) in enumerate(averages):
            index = indices[..., level]
            everywhere = gathered(residual.flatten(0, -2), dim=0)
            reached = gathered((index >= 0).flatten(), dim=0)
            replace_dead_codes_(
                codes, cluster_size, code_sum, everywhere, fold_in(key, level), threshold=self.dead_code_threshold, mask=reached
            )
            residual = residual - gather_codes(before[level], index)

    def count(self, counts: list[Tensor]) -> None:
        self.batch_counts.copy_(torch.cat(counts))
        self.epoch_counts.add_(self.batch_counts)

    def usage(self, counts: Tensor) -> CodeUsage:
        return CodeUsage(*(torch.stack(v) for v in zip(*(usage_of(c) for c in counts.split(self.sizes)), strict=True)))

    def _apply(self, fn: Callable, recurse: bool = True) -> ResidualVectorQuantizer:
        if not self.ema:
            return super()._apply(fn, recurse)
        names = ("codebooks", "cluster_size", "code_sum")
        keep_wide(self, names, lambda: super(ResidualVectorQuantizer, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        codes = self.sizes[0] if len(set(self.sizes)) == 1 else self.sizes
        return f"num_levels={len(self.sizes)}, num_codes={codes}, dim={self.dim}, shared={self.shared}, ema={self.ema}"


def as_levels(values: Tensor | list[Tensor] | None) -> list[Tensor]:
    assert values is not None
    return list(values)
