"""Training an autoencoder with Gaussian latents, against a discriminator as latent diffusion does."""

from dataclasses import dataclass

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen.models import AutoencoderKL
from mmgen.training.adversarial import AdversarialConfig, AdversarialTrainer
from mmgen.training.loop import WARM


@dataclass(frozen=True)
class VAETrainingConfig(AdversarialConfig):
    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 1e-3
    kl_weight: float = 1e-6  # of the divergence, a sum over latents, against a sum over the numbers of an image
    variance_decay: float = 0.99  # of the running variance of the latents

    def __post_init__(self):
        super().__post_init__()
        if not self.kl_weight >= 0:
            raise ValueError(f"--kl-weight must be 0 or more, got {self.kl_weight}")
        if not 0 <= self.variance_decay < 1:
            raise ValueError(f"variance_decay must be in [0, 1), got {self.variance_decay}")


class VAETrainer(AdversarialTrainer):
    """The noise of a step comes from a key that the seed and the step make."""

    watched = ("reconstruction", "kl", "grad_norm", "disc_loss", "disc_grad_norm")
    model: AutoencoderKL
    config: VAETrainingConfig

    def prepare(self) -> None:
        super().prepare()
        self.key = torch.tensor([self.config.seed, 0], device=self.device)

    def metrics_of_step(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        out = self.model(image, mk.fold_in(self.key, self.step))
        kl = out.posterior.kl().mean()
        metrics = self.play(image, out.image, self.config.kl_weight * kl / image[0].numel())
        self.follow(out.latents.detach())
        return metrics | {"kl": kl.detach(), "scaling_factor": self.model.scaling_factor}

    def follow(self, latents: Tensor) -> None:
        """Moves the running variance towards that of a batch's latents, faster at first."""
        decay = min(self.config.variance_decay, self.step / (self.step + WARM))
        self.model.latent_variance.lerp_(latents.var(), 1 - decay)
