"""Training a VQGAN: a VQ-VAE against a discriminator."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmgen.models.vqvae import Reconstruction
from mmgen.training.adversarial import AdversarialConfig, AdversarialTrainer
from mmgen.training.vqvae import VQVAETrainer, VQVAETrainingConfig


@dataclass(frozen=True)
class VQGANTrainingConfig(VQVAETrainingConfig, AdversarialConfig):
    steps: int = 600


class VQGANTrainer(AdversarialTrainer, VQVAETrainer):
    """The codebook is a VQVAETrainer's, the losses are an AdversarialTrainer's."""

    watched = ("reconstruction", "vq", "grad_norm", "disc_loss", "disc_grad_norm")
    config: VQGANTrainingConfig

    def learned(self, image: Tensor, out: Reconstruction) -> dict[str, Tensor]:
        return self.play(image, out.image, out.vq_loss) | {"vq": out.vq_loss.detach()}

    def postfix(self, record: dict[str, Any]) -> str:
        return f"{super().postfix(record)}, usage {record['window_usage']:.1%}, perplexity {record['window_perplexity']:.0f}"
