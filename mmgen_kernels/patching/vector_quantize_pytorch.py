"""vector-quantize-pytorch (written against 1.32): VectorQuantize, and with it ResidualVQ and all that is made of it.

Stock, `Codebook.forward` returns the distances (N, K) that only some losses read, and turns indices into a one-hot matrix
(N, K) for gather and statistics. Here the stock `VectorQuantize.forward` runs on a view of the module whose `_codebook`
does neither, and applies the rotation trick in the same operator. Projections, layouts, straight-through and losses
remain stock code, and so do all small things of the codebook: its EMA of means, the replacement of dead codes with its
draws, affine statistics.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.patching.rule import ROWS, Call, Forward, Rule, descends_from, has_hooks, overridden

PACKAGE = "vector_quantize_pytorch"
# What the codebook below takes the place of, or calls and relies on.
CODEBOOK_METHODS = ("forward", "init_embed_", "update_codebook", "track_cluster_size_and_embed_avg")
CODEBOOK_ATTRIBUTES = (
    *("affine_param", "all_reduce_fn", "cluster_size", "codebook_size", "decay", "ema_update", "embed", "embed_avg", "initted"),
    *("gumbel_sample", "has_dead_code_replacement", "kmeans_all_reduce_fn", "kmeans_iters", "learnable_codebook", "use_ddp"),
    *("manual_ema_update", "sample_fn", "replace_sample_fn", "update_affine", "use_cosine_sim", "vq_bridge"),
)


class VectorQuantizeForward(Forward):
    """`VectorQuantize.forward`, with the codebook's part replaced."""

    def __call__(self, x: Tensor, indices: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        if indices is not None or wants_distances(module) or has_hooks(module._codebook):
            return self.stock(x, indices, *args, **kwargs)
        return type(module).forward(View(module, wants_rotation(module, x)), x, None, *args, **kwargs)


def wants_distances(module: Any) -> bool:
    """Read at every call, as a user may switch a loss on after patching."""
    return module.training and bool(module.has_codebook_diversity_loss or module.commitment_use_cross_entropy_loss)


def wants_rotation(module: Any, x: Tensor) -> bool:
    """Whether stock would turn the codes by the rotation trick; with a learnable codebook its losses need them as they are."""
    wanted = module.training and module.rotation_trick and module.route_gradients_to_input
    return wanted and x.requires_grad and not module._codebook.learnable_codebook


class View:
    """A VectorQuantize as its own stock forward sees it: everything is the module's, but the codebook. Where that has carried the
    gradient past the codes already, by one operator in place of two dozen, nothing is left to route."""

    def __init__(self, module: Any, rotate: bool):
        vars(self).update(_module=module, _codebook=FusedCodebook(module._codebook, rotate))

    def __getattr__(self, name: str) -> Any:
        if name == "route_gradients_to_input" and self._codebook.has_rotated:
            return False
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class FusedCodebook:
    """A Codebook without a matrix N x K; lives for one call."""

    def __init__(self, codebook: nn.Module, rotate: bool):
        self._stock, self._rotate, self.has_rotated = codebook, rotate, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        ema_update: bool | None = None,
        update_usage: bool = True,
        sample_codebook_temp: float | None = None,  # of sampling only, which is not served
        **others: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, N, D) or (H, B, N, D); codes of the same shape in fp32, indices without D, and no distances."""
        stock: Any = self._stock
        if any(value is not None and value is not False for value in others.values()):
            others |= {"mask": mask, "freeze_codebook": freeze_codebook, "ema_update": ema_update, "update_usage": update_usage}
            return stock(x, sample_codebook_temp=sample_codebook_temp, **others)
        rows = x.float()  # stock looks up in fp32 whatever it is given
        if x.dim() < 4:
            rows = rows[None]
        leading = rows.shape[:-1]  # (H, B, N)
        rows = rows.flatten(1, -2)  # (H, B * N, D)
        if mask is not None:  # (B, N); where heads share a codebook they lie between B and N
            within = rows.shape[1] // max(1, mask.numel())
            mask = mask[:, None].expand(-1, within, -1).reshape(1, -1).expand(len(rows), -1)  # (H, B * N)
        initialise(stock, rows.detach(), mask)
        if stock.affine_param:
            stock.update_affine(rows, stock.embed, mask=mask)
        embed = (stock.embed if stock.learnable_codebook else stock.embed.detach()).to(rows.dtype)  # (H, K, D)
        if stock.affine_param:
            batch_std, codebook_std = standard_deviations(stock)
            embed = (embed - stock.codebook_mean) * (batch_std / codebook_std) + stock.batch_mean
        # masked rows are looked up too: stock reads their indices in the orthogonal loss of active codes
        if self._rotate:
            codes, indices, *_ = mk.vector_quantize(rows, embed, gradient="rotation", metric=metric_of(stock))
            self.has_rotated = True
        else:
            indices = lookup(stock, rows, embed)  # (H, B * N)
            codes = mk.gather_codes(embed, indices)  # (H, B * N, D)
        if stock.training and update_usage and not freeze_codebook:
            update(stock, rows.detach(), indices, mask, stock.ema_update if ema_update is None else ema_update)
        codes, indices = codes.view(*leading, codes.shape[-1]), indices.view(leading)
        return (codes[0], indices[0], None) if x.dim() < 4 else (codes, indices, None)


def metric_of(stock: Any) -> str:
    """Stock's cosine similarity is a dot product with codes that it keeps normalised."""
    return "dot" if stock.use_cosine_sim else "l2"


def lookup(stock: Any, rows: Tensor, codes: Tensor) -> Tensor:
    """(H, N, D), (H, K, D) -> (H, N)"""
    return mk.nearest_code(rows.detach(), codes.detach(), metric=metric_of(stock))


def standard_deviations(stock: Any) -> tuple[Tensor, Tensor]:
    """Of the batch and of the codebook, of an affine codebook."""
    return stock.batch_variance.clamp(min=1e-5).sqrt(), stock.codebook_variance.clamp(min=1e-5).sqrt()


def update(stock: Any, rows: Tensor, indices: Tensor, mask: Tensor | None, ema_update: bool) -> None:
    """Counts and sums by code, their moving averages, and from these the codes: in the order and by the methods of stock."""
    if not ema_update and not stock.has_dead_code_replacement:
        return
    moved = rows
    if stock.affine_param:
        batch_std, codebook_std = standard_deviations(stock)
        moved = (rows - stock.batch_mean) * (codebook_std / batch_std) + stock.codebook_mean
    counts, sums = mk.code_statistics(moved, indices, stock.codebook_size, mask=mask, heads=True)  # (H, K), (H, K, D)
    for average, value in ((stock.cluster_size, counts.to(rows.dtype)), (stock.embed_avg, sums)):
        stock.all_reduce_fn(value)
        if average.grad is not None:  # accum_ema_update has left sums of earlier calls there
            value = value + average.grad
            average.grad = None
        average.data.lerp_(value.to(average), 1.0 - stock.decay)
    if ema_update and not stock.manual_ema_update:
        stock.update_ema()
    stock.expire_codes_(rows, seq_mask=mask)


def initialise(stock: Any, rows: Tensor, mask: Tensor | None) -> None:
    """k-means at the first call, with stock's own draws; its matrix N x K and index tensor N x D are what is left out."""
    if stock.initted:
        return
    if mask is not None:
        rows = rows[mask].view(len(rows), -1, rows.shape[-1])
    if rows.shape[1] < stock.codebook_size:
        warnings.warn(f"k-means starts {stock.codebook_size} codes from {rows.shape[1]} rows: some codes are equal", stacklevel=2)
    means = stock.sample_fn(rows, stock.codebook_size)  # (H, K, D)
    for _ in range(stock.kmeans_iters):
        counts, sums = mk.code_statistics(rows, lookup(stock, rows, means), stock.codebook_size, heads=True)
        stock.kmeans_all_reduce_fn(counts)
        moved = sums / counts.clamp(min=1)[..., None]
        stock.kmeans_all_reduce_fn(moved)
        if stock.use_cosine_sim:
            moved = F.normalize(moved, dim=-1, eps=1e-6)
        means = torch.where((counts == 0)[..., None], means, moved)
    stock.embed_avg.data.copy_(means * counts[..., None])
    stock.cluster_size.data.copy_(counts)
    stock.update_ema()
    stock.initted.data.fill_(True)


# -- rules ------------------------------------------------------------------------------------------------------------


class VectorQuantizeRule(Rule):
    """VectorQuantize, wherever it stands: alone, in ResidualVQ, GroupedResidualVQ, RandomProjectionQuantizer and others."""

    family = "vq"
    by = "mk.vector_quantize or mk.nearest_code and mk.gather_codes, mk.code_statistics"
    falls_back_when = (
        "indices= (cross entropy to given indices reads all distances)",
        "topk=, or beam_size= of ResidualVQ",
        "codebook_transform_fn=",
        "ema_update_weight=",
        "accum_ema_update=True",
        "the codebook has hooks",
    )

    def recognises(self, module: nn.Module) -> bool:
        return descends_from(module, PACKAGE, "VectorQuantize") is not None

    def reasons_against(self, module: Any) -> list[str]:
        base = descends_from(module, PACKAGE, "VectorQuantize")
        codebook = module._codebook
        codebook_base = descends_from(codebook, PACKAGE, "Codebook")
        if base is None or codebook_base is None:
            return [f"its codebook is a {type(codebook).__name__}: this rule knows the Codebook of version 1.32"]
        if missing := [name for name in CODEBOOK_ATTRIBUTES if not hasattr(codebook, name)]:
            return [f"its Codebook has no {', '.join(missing)}: this rule knows version 1.32"]
        reasons = overridden(module, base, "forward") + overridden(codebook, codebook_base, *CODEBOOK_METHODS)
        if module.commitment_use_cross_entropy_loss:
            reasons.append("commitment_use_cross_entropy_loss reads all distances")
        if module.has_codebook_diversity_loss:
            reasons.append("codebook_diversity_loss_weight > 0 reads all distances")
        if codebook.vq_bridge is not None:
            reasons.append("vq_bridge computes the codebook anew in every call")
        sampler = codebook.gumbel_sample
        keywords = sampler.keywords if isinstance(sampler, functools.partial) else {}
        if not keywords.keys() <= {"stochastic", "straight_through"}:
            reasons.append(f"gumbel_sample is called with {', '.join(keywords)}")
        if keywords.get("stochastic"):
            reasons.append("stochastic_sample_codes draws from all distances")
        if keywords.get("straight_through"):
            reasons.append("straight_through takes the softmax of all distances")
        return reasons

    def forward(self, module: nn.Module) -> Forward:
        return VectorQuantizeForward(module)

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        if module.accept_image_fmap:
            yield (draw(2, module.dim, 4, ROWS // 8),), {}
        elif module.accept_3d_fmap:
            yield (draw(2, module.dim, 2, 2, ROWS // 8),), {}
        else:
            shape = (2, ROWS // 2, module.dim) if module.channel_last else (2, module.dim, ROWS // 2)
            yield (draw(*shape),), {}
            x = draw(*shape)
            yield (x,), {"mask": (torch.arange(ROWS, device=x.device) % 5 != 0).view(2, -1)}

    def prepare(self, module: Any, draw: Callable[..., Tensor]) -> None:
        codebook = module._codebook
        if codebook.codebook_size > ROWS:  # k-means would start several codes from the same row: ties throughout
            codebook.initted.data.fill_(True)
        if codebook.initted:
            codes = draw(*codebook.embed.shape)
            codebook.embed.data.copy_(F.normalize(codes, dim=-1) if codebook.use_cosine_sim else codes)
            codebook.embed_avg.data.copy_(codebook.embed * codebook.cluster_size[..., None])
        if codebook.use_ddp:
            codebook.sample_fn = codebook.replace_sample_fn = vars(sys.modules[type(codebook).__module__])["batched_sample_vectors"]
            codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = lambda tensor: None
        codebook.use_ddp = codebook.sync_affine_param = False


class ResidualVQRule(Rule):
    """ResidualVQ stays as it is and its layers are patched, unless it feeds them what only stock code serves."""

    family = "vq"
    by = "its layers"
    encloses = True

    def recognises(self, module: nn.Module) -> bool:
        return descends_from(module, PACKAGE, "ResidualVQ") is not None

    def reasons_against(self, module: Any) -> list[str]:
        reasons = []
        if getattr(module, "implicit_neural_codebook", False):
            reasons.append("implicit_neural_codebook computes a codebook per row")
        for option in ("beam_size", "eval_beam_size"):
            if (getattr(module, option, None) or 1) > 1:
                reasons.append(f"{option}={getattr(module, option)} asks for several codes per row")
        return reasons
