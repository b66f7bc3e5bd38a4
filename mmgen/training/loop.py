"""The training loop: one model, one dataset, one folder that holds everything needed to go on after a kill."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmgen.data import Data, StepSampler
from mmgen.evaluation import code_counts, evaluate, perplexity, usage
from mmgen.evaluation.metrics import PIXEL_RANGE
from mmgen.models import VQVAE
from mmgen.training import checkpoint, log
from mmgen.training.interruption import deferred_interruption
from mmgen.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 100  # long and quadratic, while codes are still changing hands: +0.4 dB after the demo's 300 steps
    final_learning_rate: float = 0.05  # as a share of learning_rate, at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    codebook_window: int = 10  # steps over which code usage is counted; at its end unused codes are revived
    revive_until: float = 0.8  # share of the steps after which codes are left in peace
    log_every: int = 10
    eval_every: int = 50
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self):
        counts = "steps batch_size codebook_window log_every eval_every checkpoint_every keep_checkpoints"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2^63 - 1, got {self.seed}")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be positive, got {self.learning_rate}")

    def learning_rate_at(self, step: int) -> float:
        """Quadratic warm-up times a cosine; a function of the step alone, so that there is no schedule to save."""
        warmup = min((step + 1) / max(self.warmup_steps, 1), 1.0) ** 2
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * warmup * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


class Trainer:
    """Trains `model` and keeps log.jsonl and checkpoints in `folder`; goes on from the last checkpoint it finds there.

    The same folder, configuration, device and thread count give the same bits, however often the run was cut.
    """

    def __init__(
        self,
        model: VQVAE,
        data: Data,
        config: TrainingConfig,
        folder: Path,
        *,
        settings: dict[str, dict],
        device: torch.device,
    ):
        self.model = model.to(device)
        self.data, self.config, self.folder, self.device = data, config, folder, device
        self.settings = settings  # the checkpoint's config.json; a resumed run must agree with it
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True
        )
        self.log_file = folder / "log.jsonl"
        self.step = 0
        self.window_counts = torch.zeros(model.config.codebook_size, dtype=torch.int64, device=device)  # (K,)
        self.stopwatch = Stopwatch(model.quantize, device)
        self.pending: list[dict[str, Tensor]] = []  # metrics of the steps since the last log, still on the device
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, until: int | None = None) -> None:
        """Trains up to step `until`, or to the end."""
        stop = self.config.steps if until is None else min(until, self.config.steps)
        sampler = StepSampler(
            len(self.data.train), self.config.batch_size, seed=self.config.seed, start=self.step, stop=stop
        )
        loader = DataLoader(
            self.data.train,
            batch_sampler=sampler,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or else it would draw from the global one, which resuming has just set
        )
        with deferred_interruption() as interrupted, self._progress_bar() as bar:
            self.window_start = time.perf_counter()
            for image in loader:
                self.pending.append(self._train_step(image.to(self.device, non_blocking=True)))
                bar.update()
                cut = interrupted.is_set()
                last = cut or self.step == stop
                if last or self._due(self.config.log_every, self.config.eval_every, self.config.checkpoint_every):
                    self._log(bar, held_out=self.step == self.config.steps or self._due(self.config.eval_every))
                if last or self._due(self.config.checkpoint_every):
                    self._save()
                    self.window_start = time.perf_counter()
                if cut:
                    raise KeyboardInterrupt

    def _train_step(self, image: Tensor) -> dict[str, Tensor]:
        """One update on images (B, C, H, W); returns its metrics without waiting for the device."""
        config, model = self.config, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        out = model(image)
        reconstruction = F.mse_loss(out.image, image)
        loss = reconstruction + out.vq_loss
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.step += 1

        batch_counts = code_counts(out.indices, len(self.window_counts))  # (K,)
        self.window_counts += batch_counts
        metrics = {
            "loss": loss.detach(),
            "reconstruction": reconstruction.detach(),
            "vq": out.vq_loss.detach(),
            "grad_norm": grad_norm,
            "batch_usage": usage(batch_counts),
            "batch_perplexity": perplexity(batch_counts),
            "window_usage": usage(self.window_counts),
            "window_perplexity": perplexity(self.window_counts),
            "fingerprint": fingerprint(out.indices),
        }
        if self._due(config.codebook_window):
            if self.step <= config.revive_until * config.steps:
                model.quantize.revive_(out.latents, self.window_counts, turn=self.step // config.codebook_window)
            self.window_counts.zero_()
        return metrics

    def _due(self, *intervals: int) -> bool:
        return any(self.step % interval == 0 for interval in intervals)

    def _log(self, bar: tqdm, *, held_out: bool) -> None:
        """Brings the metrics since the last call over in one transfer, judges them and writes them down."""
        on_device = torch.stack([metric.double() for metrics in self.pending for metric in metrics.values()])
        values = on_device.view(len(self.pending), -1).tolist()
        seconds = (time.perf_counter() - self.window_start) / len(values)
        first = self.step - len(values) + 1
        records: list[dict[str, Any]] = []
        quantizer_times = self.stopwatch.milliseconds()
        for step, (row, quantizer_ms) in enumerate(zip(values, quantizer_times, strict=True), first):
            record = {"step": step} | dict(zip(self.pending[0], row, strict=True))
            self._require_finite(record)
            record["fingerprint"] = int(record["fingerprint"])
            record["psnr"] = 10 * math.log10(PIXEL_RANGE**2 / max(record["reconstruction"], 1e-12))
            records.append(record | {"quantizer_ms": quantizer_ms, "step_seconds": seconds})
        self.pending.clear()
        if held_out:
            scores = evaluate(self.model, self.data.held_out, batch_size=self.config.batch_size, device=self.device)
            records[-1] |= {f"held_out_{name}": value for name, value in scores.items()}
        log.append(self.log_file, records)
        shown = records[-1]
        bar.set_postfix_str(
            f"loss {shown['loss']:.4f}, PSNR {shown['psnr']:.2f} dB, usage {shown['window_usage']:.1%}, "
            f"perplexity {shown['window_perplexity']:.0f}, quantizer {shown['quantizer_ms']:.1f} ms"
        )
        self.window_start = time.perf_counter()

    def _require_finite(self, record: dict[str, float]) -> None:
        watched = ("reconstruction", "vq", "grad_norm")
        wrong = [f"{name} is {record[name]}" for name in watched if not math.isfinite(record[name])]
        if not wrong:
            return
        spoiled = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        last = checkpoint.latest(self._checkpoints)
        raise FloatingPointError(
            f"step {record['step']}: {', '.join(wrong)}; parameters that are not finite by step {self.step}: "
            f"{', '.join(spoiled) or 'none'}; last good checkpoint: {last or 'none'}"
        )

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _save(self) -> None:
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "window_counts": self.window_counts,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        keep = self.config.keep_checkpoints
        checkpoint.save(self._checkpoints, self.step, self.model.state_dict(), self.settings, state, keep=keep)

    def _resume(self) -> None:
        last = checkpoint.latest(self._checkpoints)
        if last is None:
            log.rewind(self.log_file, 0)
            return
        require_same_run(checkpoint.read_config(last), self.settings, self.folder)
        self.model.load_state_dict(checkpoint.read_weights(last))
        state = checkpoint.read_state(last)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.window_counts.copy_(state["window_counts"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        log.rewind(self.log_file, self.step)

    def _progress_bar(self) -> tqdm:
        return tqdm(total=self.config.steps, initial=self.step, desc=self.folder.name, unit="step", dynamic_ncols=True)


def fingerprint(indices: Tensor) -> Tensor:
    """A number, (), that changes with any single index: it tells from two logs where two runs first chose differently.

    Below 2^53, so that it travels with the other metrics in a float64.
    """
    flat = indices.flatten()  # (N,)
    place = torch.arange(1, len(flat) + 1, device=flat.device)  # (N,)
    weight = place * 2654435761 % (1 << 31)  # (N,); an odd multiplier: another weight for each place
    return ((flat + 1) * weight).sum() % (1 << 53)


def require_same_run(saved: dict, asked: dict, folder: Path) -> None:
    different = [
        f"{section}.{name} was {saved[section].get(name)!r}, now {value!r}"
        for section, values in asked.items()
        for name, value in values.items()
        if saved[section].get(name) != value
    ]
    if different:
        raise ValueError(
            f"--out {folder} holds a run with other settings ({'; '.join(different)}): "
            "give those settings or another --out, or start over with --no-resume"
        )
