"""LlamaGen's VectorQuantizer: normalised codes, usage counted over the last 65536 tokens, optional entropy loss.

Recognised by what it has. Stock computes the entropy term over the matrix N x K also where its weight is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.patching.rule import ROWS, Call, Forward, Rule, embedding_reasons, graph_of, has_hooks, parameters_of_forward

ATTRIBUTES = ("n_e", "e_dim", "beta", "entropy_loss_ratio", "l2_norm", "show_usage", "embedding")
ENTROPY_TEMPERATURE = 0.01  # stock's default, which its forward never changes
ENTROPY_EPS = 1e-5  # inside stock's logarithm of the mean probability


class VectorQuantizerForward(Forward):
    """Codes and losses in one operator; no distances."""

    def __call__(self, z: Tensor) -> Any:
        module: Any = self.module
        if has_hooks(module.embedding):
            return self.stock(z)
        rows, codebook = z.permute(0, 2, 3, 1), module.embedding.weight  # (B, H, W, C), (K, C)
        if module.l2_norm:
            rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
        # in eval mode there are no losses, and stock leaves the codebook without a gradient rather than with one of zeros
        out = mk.vector_quantize(rows, codebook if module.training else codebook.detach())
        indices = out.indices.view(-1)  # (N,)
        usage: float = count_usage(module, indices) if module.show_usage and module.training else 0
        vq_loss = commit_loss = entropy_loss = None
        if module.training:
            dtype = torch.promote_types(rows.dtype, codebook.dtype)
            vq_loss = graph_of(out.codebook_loss, codebook).to(dtype)
            commit_loss = module.beta * graph_of(out.commitment_loss, rows).to(dtype)
            entropy_loss = (entropy(module, rows, codebook) if module.entropy_loss_ratio else 0 * out.loss).to(dtype)
        quantized = graph_of(out.quantized, rows).permute(0, 3, 1, 2)
        return quantized, (vq_loss, commit_loss, entropy_loss, usage), (None, None, indices)


def count_usage(module: Any, indices: Tensor) -> float:
    """Writes the indices into the ring of recent ones; the share of codes among these. Waits for the GPU, as stock does."""
    recent = module.codebook_used.detach()  # some versions register a Parameter, whose history would grow with every step
    recent[: -len(indices)] = recent[len(indices) :].clone()
    recent[-len(indices) :] = indices.to(recent.dtype)
    return len(torch.unique(recent)) / module.n_e


def entropy(module: Any, rows: Tensor, codebook: Tensor) -> Tensor:
    """Mean entropy of the rows' code probabilities, less the entropy of their mean; weighted."""
    each, of_mean = mk.code_entropy(rows, codebook, temperature=ENTROPY_TEMPERATURE, metric="l2", eps=ENTROPY_EPS)
    return module.entropy_loss_ratio * (each.mean() - of_mean)


class VectorQuantizerRule(Rule):
    """VectorQuantizer of LlamaGen and its descendants."""

    family = "vq"
    by = "mk.vector_quantize"
    falls_back_when = ("the embedding has hooks",)

    def recognises(self, module: nn.Module) -> bool:
        return (
            type(module).__name__ == "VectorQuantizer"
            and all(hasattr(module, name) for name in ATTRIBUTES)
            and parameters_of_forward(module) == ["z"]
        )

    def reasons_against(self, module: Any) -> list[str]:
        return embedding_reasons(module.embedding, module.n_e, module.e_dim)

    def forward(self, module: nn.Module) -> Forward:
        return VectorQuantizerForward(module)

    def magnification(self, module: Any) -> float:
        return 1 / ENTROPY_TEMPERATURE if module.entropy_loss_ratio else 1.0

    def prepare(self, module: Any, draw: Callable[..., Tensor]) -> None:
        module.embedding.weight.data.copy_(draw(*module.embedding.weight.shape))

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        yield (draw(2, module.e_dim, 4, ROWS // 8),), {}
