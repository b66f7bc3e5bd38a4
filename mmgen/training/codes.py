"""Training a model of a tokenizer's codes: a causal transformer by its likelihood, a diffusion transformer by its bound.

All see the same crops in the same order, encoded by the same tokenizer as they come. A million parameters can learn a few
photographs by heart, so what is kept of a training is its best moment on pictures that are held out.
"""

import copy
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen.data import Data
from mmgen.diffusion.codes import AbsorbingConfig
from mmgen.diffusion.mask_and_replace import process_of
from mmgen.evaluation.codes import encoded
from mmgen.models import VQVAE, CodeDiffusion, CodeTransformer
from mmgen.training.diffusion import HELD_OUT, TRAINED, WARM
from mmgen.training.loop import Trainer, TrainingConfig

BITS = 1 / math.log(2)  # in a nat


@dataclass(frozen=True)
class CodeTrainingConfig(TrainingConfig):
    steps: int = 1500
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.98)
    ema_decay: float = 0.995
    eval_every: int = 50
    checkpoint_every: int = 50

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


class CodeTrainer(Trainer):
    """A Trainer of images (B, C, H, W) on their codes; loss and scores are bits per code.

    `ema` is the average of the weights so far, and `best` what it was when it did best on the held-out pictures: the model to
    draw from, and to score on other pictures still.
    """

    config: CodeTrainingConfig

    def __init__(
        self,
        model: CodeTransformer | CodeDiffusion,
        tokenizer: VQVAE,
        data: Data,
        config: CodeTrainingConfig,
        folder: Path,
        *,
        settings: dict[str, dict],
        device: torch.device,
    ):
        self.data, self.tokenizer = data, tokenizer.to(device).requires_grad_(False).eval()
        model.embedding.look_up_(tokenizer.quantize.codebook())
        settings = settings | {"tokenizer": settings["tokenizer"] | {"weights": digest(tokenizer)}}
        super().__init__(model, data.train, config, folder, settings=settings, device=device)

    def nats(self, model: nn.Module, codes: Tensor, key: Tensor) -> Tensor:
        """-log p of pictures (B, T), or what bounds it in the mean over keys; (B,)."""
        raise NotImplementedError

    def prepare(self) -> None:
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.best = copy.deepcopy(self.ema)
        self.best_step, self.best_bits = 0, math.inf
        self.key = torch.tensor([self.config.seed, 0], device=self.device)
        self.held_out = encoded(self.tokenizer, self.data.held_out, batch_size=self.config.batch_size, device=self.device)  # (M, T)

    def key_of(self, stream: int, i: int) -> Tensor:
        return mk.fold_in(mk.fold_in(self.key, stream), i)

    def metrics_of_step(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        with torch.no_grad():
            codes = self.tokenizer.encode(image).indices.flatten(1)  # (B, T)
        bits = self.nats(self.model, codes, self.key_of(TRAINED, self.step)).mean() * BITS / codes.shape[1]
        grad_norm = self.update(bits)
        mk.update_ema(self.ema, self.model, min(self.config.ema_decay, self.step / (self.step + WARM)))
        return {"loss": bits.detach(), "grad_norm": grad_norm}

    @torch.no_grad()
    def held_out_bits(self, model: nn.Module) -> float:
        """Per code of the held-out pictures, with the same numbers drawn each time."""
        parts = enumerate(self.held_out.split(self.config.batch_size))
        nats = torch.cat([self.nats(model, codes, self.key_of(HELD_OUT, i)) for i, codes in parts])  # (M,)
        return nats.double().mean().item() * BITS / self.held_out.shape[1]

    def scores(self) -> dict[str, float]:
        """The average's bits; it is kept if it never did better."""
        bits = self.held_out_bits(self.ema)
        if bits < self.best_bits:
            self.best_step, self.best_bits = self.step, bits
            self.best.load_state_dict(self.ema.state_dict())
        return {"bits": bits}

    def postfix(self, record: dict[str, Any]) -> str:
        return f"{record['loss']:.3f} bits per code, {1 / record['step_seconds']:.1f} steps/s"

    def state(self) -> dict[str, Any]:
        best = {"weights": self.best.state_dict(), "step": self.best_step, "bits": self.best_bits}
        return {"ema": self.ema.state_dict(), "best": best}

    def load_state(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state["ema"])
        self.best.load_state_dict(state["best"]["weights"])
        self.best_step, self.best_bits = state["best"]["step"], state["best"]["bits"]


class CausalCodeTrainer(CodeTrainer):
    model: CodeTransformer

    def nats(self, model: CodeTransformer, codes: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        return model.nats(codes)


class CodeDiffusionTrainer(CodeTrainer):
    model: CodeDiffusion

    def __init__(self, model: CodeDiffusion, *args: Any, process: AbsorbingConfig, **options: Any):
        self.process = process_of(process, model.config.num_codes)
        super().__init__(model, *args, **options)

    def nats(self, model: CodeDiffusion, codes: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        return self.process.draw_nats(model, codes, key)


def digest(model: nn.Module) -> str:
    """Of the weights: a run goes on with the tokenizer that it began with, or not at all."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        hashed.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
