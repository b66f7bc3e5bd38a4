"""Training an autoencoder of images against a discriminator, as VQGAN and latent diffusion do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmgen.evaluation import decibels
from mmgen.models import DiscriminatorConfig, PatchDiscriminator
from mmgen.models.vqgan import GradientPyramid, adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from mmgen.training.autoencoder import AutoencoderTrainer
from mmgen.training.loop import TrainingConfig

Perceptual = Callable[[Tensor, Tensor], Tensor]  # reconstruction and image, (B, C, H, W) each, to a number, ()


@dataclass(frozen=True)
class AdversarialConfig(TrainingConfig):
    perceptual_weight: float = 1.0  # against 0: +0.1 dB, detail 0.07 and not 0.09; 300 steps of 32 x 32 crops, no discriminator
    # Of the adversarial loss, times the adaptive weight; 0 trains without a discriminator. Twice as much cost 1 dB in 300 steps of
    # 32 x 32 crops, for no more detail.
    disc_weight: float = 0.4
    disc_start: int = 200  # steps before the autoencoder hears of the discriminator,
    disc_warmup: int = 50  # the last of which the discriminator uses to learn: its first word is not noise
    disc_learning_rate: float = 1.0  # as a share of learning_rate
    disc_betas: tuple[float, float] = (0.5, 0.9)
    disc_channels: int = 32
    disc_layers: int = 2

    def __post_init__(self):
        super().__post_init__()
        for name in ("perceptual_weight", "disc_weight", "disc_start", "disc_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")
        if self.disc_weight > 0 and self.disc_start >= self.steps:
            raise ValueError(
                f"--disc-start must be below --steps, {self.steps}, or --disc-weight 0 for no discriminator, got {self.disc_start}"
            )
        if not self.disc_learning_rate > 0:
            raise ValueError(f"--disc-learning-rate must be positive, got {self.disc_learning_rate}")

    # Both are functions of the step alone: every rank of a distributed run does the same, and none waits for another.

    def judged_at(self, step: int) -> bool:
        """Whether the autoencoder's loss after `step` steps has the discriminator's word in it."""
        return self.disc_weight > 0 and step >= self.disc_start

    def judge_learns_at(self, step: int) -> bool:
        return self.disc_weight > 0 and step >= self.disc_start - self.disc_warmup


class AdversarialTrainer(AutoencoderTrainer):
    """Steps of an autoencoder and of a discriminator on the same images.

        loss = |reconstruction - image| + perceptual_weight * perceptual + regularizer + disc_weight * adaptive_weight * adversarial

    `perceptual` replaces the gradients' pyramid.
    """

    config: AdversarialConfig

    def __init__(self, *args: Any, perceptual: Perceptual | None = None, **options: Any):
        self.perceptual: Perceptual = perceptual or GradientPyramid()
        super().__init__(*args, **options)

    def prepare(self) -> None:
        super().prepare()
        config = self.config
        self.discriminator = PatchDiscriminator(
            DiscriminatorConfig(self.model.config.in_channels, config.disc_channels, config.disc_layers)
        ).to(self.device)
        self.disc_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=config.learning_rate, betas=config.disc_betas, weight_decay=0.0, fused=True
        )

    def play(self, image: Tensor, reconstruction: Tensor, regularizer: Tensor) -> dict[str, Tensor]:
        """One step of the autoencoder, and one of the discriminator on what it was shown."""
        step = self.step
        loss, parts = self.loss(image, reconstruction, regularizer)
        grad_norm = self.update(loss)  # and `self.step` moves on
        judged = self.discriminator_step(image, reconstruction.detach(), step)
        return parts | {"grad_norm": grad_norm} | judged

    def loss(self, image: Tensor, reconstruction: Tensor, regularizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A number with the loss's gradient, and the loss with its parts, detached.

        The parts' gradients are taken at the image, where they meet, and go on through the decoder as one. So the discriminator is
        passed once, for both the adaptive weight and the step, and its parameters get no gradient.
        """
        config = self.config
        pixels = F.l1_loss(reconstruction, image)
        perceptual = self.perceptual(reconstruction, image)
        similarity = pixels + config.perceptual_weight * perceptual
        (pull,) = torch.autograd.grad(similarity, reconstruction)  # (B, C, H, W)
        adversarial = weight = torch.zeros_like(similarity)
        if config.judged_at(self.step):
            adversarial = hinge_generator_loss(self.discriminator(reconstruction))
            (push,) = torch.autograd.grad(adversarial, reconstruction)  # (B, C, H, W)
            weight = adaptive_weight(self.at_last_layer(reconstruction, pull), self.at_last_layer(reconstruction, push))
            pull = pull + config.disc_weight * weight * push
        parts = {
            "loss": similarity + regularizer + config.disc_weight * weight * adversarial,
            "reconstruction": pixels,
            "perceptual": perceptual,
            "adversarial": adversarial,
            "adaptive_weight": weight,
            "psnr": decibels(F.mse_loss(reconstruction, image)),
        }
        return (reconstruction * pull).sum() + regularizer, {name: part.detach() for name, part in parts.items()}

    def at_last_layer(self, reconstruction: Tensor, force: Tensor) -> Tensor:
        """The gradient of the decoder's last weight out of one of the image, (B, C, H, W)."""
        (grad,) = torch.autograd.grad(reconstruction, self.model.last_layer, force, retain_graph=True)
        return grad

    def discriminator_step(self, image: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Its measures, 0 until it learns."""
        config = self.config
        measures = dict.fromkeys(("disc_loss", "logits_real", "logits_fake", "disc_grad_norm"), image.new_zeros(()))
        if not config.judge_learns_at(step):
            return measures
        for group in self.disc_optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step) * config.disc_learning_rate
        real, fake = self.discriminator(image), self.discriminator(reconstruction)  # (B, 1, h, w)
        loss = hinge_discriminator_loss(real, fake)
        self.disc_optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), config.grad_clip)
        self.disc_optimizer.step()
        measured = (loss.detach(), real.detach().mean(), fake.detach().mean(), grad_norm)
        return dict(zip(measures, measured, strict=True))

    def postfix(self, record: dict[str, Any]) -> str:
        return (
            f"loss {record['loss']:.4f}, PSNR {record['psnr']:.2f} dB, discriminator {record['disc_loss']:.3f}, "
            f"weight {record['adaptive_weight']:.3g}"
        )

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        judge = ((f"discriminator.{name}", p) for name, p in self.discriminator.named_parameters())
        return chain(super().named_parameters(), judge)

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "discriminator": self.discriminator.state_dict(),
            "disc_optimizer": self.disc_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.discriminator.load_state_dict(state["discriminator"])
        self.disc_optimizer.load_state_dict(state["disc_optimizer"])
