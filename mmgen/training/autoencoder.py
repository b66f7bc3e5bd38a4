"""Training what turns images into latents and back."""

from pathlib import Path

import torch

from mmgen.data import Data
from mmgen.evaluation import evaluate
from mmgen.models import Autoencoder
from mmgen.training.loop import Trainer, TrainingConfig


class AutoencoderTrainer(Trainer):
    """A Trainer of images (B, C, H, W), scored by its reconstructions of held-out ones."""

    model: Autoencoder

    def __init__(
        self,
        model: Autoencoder,
        data: Data,
        config: TrainingConfig,
        folder: Path,
        *,
        settings: dict[str, dict],
        device: torch.device,
    ):
        self.data = data
        super().__init__(model, data.train, config, folder, settings=settings, device=device)

    def scores(self) -> dict[str, float]:
        return evaluate(self.model, self.data.held_out, batch_size=self.config.batch_size, device=self.device)
