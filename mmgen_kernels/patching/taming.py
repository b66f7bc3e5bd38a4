"""taming-transformers' VectorQuantizer2, recognised by what it has, as its file is copied from project to project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.patching.rule import ROWS, Call, Forward, Rule, embedding_reasons, graph_of, has_hooks, parameters_of_forward

ATTRIBUTES = ("n_e", "e_dim", "beta", "legacy", "remap", "sane_index_shape", "embedding")
PARAMETERS = ["z", "temp", "rescale_logits", "return_logits"]


class VectorQuantizer2Forward(Forward):
    """Codes, loss and indices of a feature map in one operator."""

    def __call__(self, z: Tensor, *others: Any, **options: Any) -> Any:
        module: Any = self.module
        given = [value for value in (*others, *options.values()) if value is not None and value is not False]
        if has_hooks(module.embedding) or given:  # stock checks what it is given
            return self.stock(z, *others, **options)
        rows = z.permute(0, 2, 3, 1)  # (B, H, W, C)
        weight = module.embedding.weight  # (K, C)
        out = mk.vector_quantize(rows, weight, beta=module.beta, legacy_beta=bool(module.legacy))
        indices = out.indices.view(-1)  # (N,)
        if module.remap is not None:
            indices = module.remap_to_used(indices.view(len(z), -1)).view(-1, 1)
        if module.sane_index_shape:
            indices = indices.view(out.indices.shape)
        loss = out.loss.to(torch.promote_types(z.dtype, weight.dtype))
        return graph_of(out.quantized, rows).permute(0, 3, 1, 2).contiguous(), loss, (None, None, indices)


class VectorQuantizer2Rule(Rule):
    """VectorQuantizer2 of taming-transformers, latent-diffusion and their descendants."""

    family = "vq"
    by = "mk.vector_quantize"
    falls_back_when: tuple[str, ...] = ("temp=, rescale_logits= or return_logits= is given", "the embedding has hooks")

    def recognises(self, module: nn.Module) -> bool:
        return (
            type(module).__name__ in ("VectorQuantizer2", "VectorQuantizer")
            and all(hasattr(module, name) for name in ATTRIBUTES)
            and parameters_of_forward(module) in (PARAMETERS, PARAMETERS[:1])
        )

    def reasons_against(self, module: Any) -> list[str]:
        reasons = embedding_reasons(module.embedding, module.n_e, self.dim(module))
        if not isinstance(module.beta, (int, float)):
            reasons.append(f"beta is a {type(module.beta).__name__}, not a number")
        return reasons

    def dim(self, module: Any) -> int:
        return module.e_dim

    def forward(self, module: nn.Module) -> Forward:
        return VectorQuantizer2Forward(module)

    def prepare(self, module: Any, draw: Callable[..., Tensor]) -> None:
        module.embedding.weight.data.copy_(draw(*module.embedding.weight.shape))

    def calls(self, module: Any, draw: Callable[..., Tensor]) -> Iterator[Call]:
        yield (draw(2, self.dim(module), 4, ROWS // 8),), {}
