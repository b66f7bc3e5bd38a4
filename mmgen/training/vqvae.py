"""Training a VQ-VAE: reconstruction and codebook, with the codes that nobody uses revived."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgen.evaluation import code_counts, decibels, perplexity, usage
from mmgen.models import VQVAE
from mmgen.models.vqvae import Reconstruction
from mmgen.training.autoencoder import AutoencoderTrainer
from mmgen.training.loop import TrainingConfig
from mmgen.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class VQVAETrainingConfig(TrainingConfig):
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_power: float = 2.0  # long and quadratic, while codes are still changing hands: +0.4 dB after the demo's 300 steps
    codebook_window: int = 10  # steps over which code usage is counted; at its end unused codes are revived
    revive_until: float = 0.8  # share of the steps after which codes are left in peace

    counts: ClassVar[tuple[str, ...]] = (*TrainingConfig.counts, "codebook_window")


class VQVAETrainer(AutoencoderTrainer):
    """A Trainer of images (B, C, H, W)."""

    watched: Sequence[str] = ("reconstruction", "vq", "grad_norm")
    model: VQVAE
    config: VQVAETrainingConfig

    def prepare(self) -> None:
        codes = self.model.config.codebook_size
        self.window_counts = torch.zeros(codes, dtype=torch.int64, device=self.device)  # (K,)
        self.stopwatch = Stopwatch(self.model.quantize, self.device)

    def metrics_of_step(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        out = self.model(image)
        return self.learned(image, out) | self.counted(out)

    def learned(self, image: Tensor, out: Reconstruction) -> dict[str, Tensor]:
        """The update, and its losses."""
        reconstruction = F.mse_loss(out.image, image)
        loss = reconstruction + out.vq_loss
        grad_norm = self.update(loss)
        return {
            "loss": loss.detach(),
            "reconstruction": reconstruction.detach(),
            "vq": out.vq_loss.detach(),
            "grad_norm": grad_norm,
            "psnr": decibels(reconstruction.detach()),
        }

    def counted(self, out: Reconstruction) -> dict[str, Tensor]:
        """Which codes were used; those that are not are revived."""
        config = self.config
        batch_counts = code_counts(out.indices, len(self.window_counts))  # (K,)
        self.window_counts += batch_counts
        metrics = {
            "batch_usage": usage(batch_counts),
            "batch_perplexity": perplexity(batch_counts),
            "window_usage": usage(self.window_counts),
            "window_perplexity": perplexity(self.window_counts),
            "fingerprint": fingerprint(out.indices),
        }
        if self._due(config.codebook_window):
            if self.step <= config.revive_until * config.steps:
                turn = self.step // config.codebook_window
                self.model.quantize.revive_(out.latents, self.window_counts, turn=turn)
            self.window_counts.zero_()
        return metrics

    def told(self, records: list[dict[str, Any]]) -> None:
        for record, quantizer_ms in zip(records, self.stopwatch.milliseconds(), strict=True):
            record["fingerprint"] = int(record["fingerprint"])
            record["quantizer_ms"] = quantizer_ms

    def postfix(self, record: dict[str, Any]) -> str:
        return (
            f"loss {record['loss']:.4f}, PSNR {record['psnr']:.2f} dB, usage {record['window_usage']:.1%}, "
            f"perplexity {record['window_perplexity']:.0f}, quantizer {record['quantizer_ms']:.1f} ms"
        )

    def state(self) -> dict[str, Any]:
        return {"window_counts": self.window_counts}

    def load_state(self, state: dict[str, Any]) -> None:
        self.window_counts.copy_(state["window_counts"])


def fingerprint(indices: Tensor) -> Tensor:
    """A number, (), that changes with any single index: it tells from two logs where two runs first chose differently.

    Below 2^53, so that it travels with the other metrics in a float64.
    """
    flat = indices.flatten()  # (N,)
    place = torch.arange(1, len(flat) + 1, device=flat.device)  # (N,)
    weight = place * 2654435761 % (1 << 31)  # (N,); an odd multiplier: another weight for each place
    return ((flat + 1) * weight).sum() % (1 << 53)
