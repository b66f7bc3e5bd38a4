"""Training a diffusion model of classes, with a moving average of its weights."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import mmgen_kernels as mk
from mmgen.data import LabelledData
from mmgen.diffusion import Objective, ObjectiveConfig
from mmgen.models import DiT
from mmgen.training.loop import WARM, Trainer, TrainingConfig

# Streams of the seed's key: what is scored or drawn with the same seed meets no noise of the training.
TRAINED, HELD_OUT, TEST, FRESH, DRAWN = range(5)


@dataclass(frozen=True)
class DiTTrainingConfig(TrainingConfig):
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    final_learning_rate: float = 0.02
    ema_decay: float = 0.995
    eval_every: int = 200
    checkpoint_every: int = 200

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


class DiTTrainer(Trainer):
    """A Trainer of images (B, C, S, S) with labels (B,).

    Times and noise of a step come from a key that the seed and the step make; labels are dropped by torch's generator, which the
    checkpoints hold. `ema` is the model to sample from.
    """

    model: DiT
    config: DiTTrainingConfig

    def __init__(
        self,
        model: DiT,
        data: LabelledData,
        objective: ObjectiveConfig,
        config: DiTTrainingConfig,
        folder: Path,
        *,
        settings: dict[str, dict],
        device: torch.device,
    ):
        self.data, self.objective = data, Objective(objective, device)
        super().__init__(model, data.train, config, folder, settings=settings, device=device)

    def prepare(self) -> None:
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.key = torch.tensor([self.config.seed, 0], device=self.device)

    def key_of(self, stream: int, i: int) -> Tensor:
        return mk.fold_in(mk.fold_in(self.key, stream), i)

    def metrics_of_step(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        loss = self.objective.loss(self.model, image, labels, self.key_of(TRAINED, self.step))
        grad_norm = self.update(loss)
        mk.update_ema(self.ema, self.model, min(self.config.ema_decay, self.step / (self.step + WARM)))
        return {"loss": loss.detach(), "grad_norm": grad_norm}

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """The average's loss over the held-out images, at the same times with the same noise each time."""
        losses, sizes = [], []
        for i, (image, labels) in enumerate(DataLoader(self.data.held_out, batch_size=256, generator=torch.Generator())):
            image, labels = image.to(self.device), labels.to(self.device)
            losses.append(self.objective.loss(self.ema, image, labels, self.key_of(HELD_OUT, i)))
            sizes.append(len(image))
        weights = torch.tensor(sizes, device=self.device)
        return {"loss": ((torch.stack(losses) * weights).sum() / weights.sum()).item()}

    def postfix(self, record: dict[str, Any]) -> str:
        return f"loss {record['loss']:.4f}, {1 / record['step_seconds']:.1f} steps/s"

    def state(self) -> dict[str, Any]:
        return {"ema": self.ema.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state["ema"])
