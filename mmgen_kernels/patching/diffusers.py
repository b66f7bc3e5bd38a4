"""diffusers' VectorQuantizer (models/autoencoders/vae.py), which VQModel and the Paella decoder use."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmgen_kernels.patching.rule import descends_from, overridden
from mmgen_kernels.patching.taming import VectorQuantizer2Rule

PACKAGE = "diffusers"


class VectorQuantizerRule(VectorQuantizer2Rule):
    """The same layer as taming's under another name of its width, and with one argument only."""

    falls_back_when: tuple[str, ...] = ("the embedding has hooks",)

    def recognises(self, module: nn.Module) -> bool:
        return descends_from(module, PACKAGE, "VectorQuantizer") is not None

    def reasons_against(self, module: Any) -> list[str]:
        base = descends_from(module, PACKAGE, "VectorQuantizer")
        assert base is not None
        return overridden(module, base, "forward") + super().reasons_against(module)

    def dim(self, module: Any) -> int:
        return module.vq_embed_dim
