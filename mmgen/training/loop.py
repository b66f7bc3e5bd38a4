"""The training loop: one model, one dataset, one folder that holds everything needed to go on after a kill.

What a step does, what is counted and what is told of it is the subclass's: `vqvae.py`, `diffusion.py`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mmgen.data import StepSampler
from mmgen.training import checkpoint, log
from mmgen.training.interruption import deferred_interruption

WARM = 10  # steps; a moving average of step n weighs at most n / (n + WARM): a start in noise is soon forgotten


@dataclass(frozen=True)
class TrainingConfig:
    """Of any model; what a kind of model needs besides is its subclass's."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    warmup_power: float = 1.0
    final_learning_rate: float = 0.05  # as a share of learning_rate, at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    log_every: int = 10
    eval_every: int = 50
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    seed: int = 0

    counts: ClassVar[tuple[str, ...]] = (
        "steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
    )  # fmt: skip

    def __post_init__(self):
        for name in self.counts:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2^63 - 1, got {self.seed}")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate must be positive, got {self.learning_rate}")

    def learning_rate_at(self, step: int) -> float:
        """A warm-up times a cosine; a function of the step alone, so that there is no schedule to save."""
        warmup = min((step + 1) / max(self.warmup_steps, 1), 1.0) ** self.warmup_power
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * warmup * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


class Trainer:
    """Trains `model` and keeps log.jsonl and checkpoints in `folder`; goes on from the last checkpoint it finds there.

    The same folder, configuration, device and thread count give the same bits, however often the run was cut.
    """

    watched: Sequence[str] = ("loss", "grad_norm")  # metrics that stop the run when they are not finite
    config: TrainingConfig

    def __init__(
        self,
        model: nn.Module,
        train: Dataset,
        config: TrainingConfig,
        folder: Path,
        *,
        settings: dict[str, dict],
        device: torch.device,
    ):
        self.model: nn.Module = model.to(device)
        self.train, self.config, self.folder, self.device = train, config, folder, device
        self.settings = settings  # the checkpoint's config.json; a resumed run must agree with it
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True
        )
        self.log_file = folder / "log.jsonl"
        self.step = 0
        self.pending: list[dict[str, Tensor]] = []  # metrics of the steps since the last log, still on the device
        self.prepare()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def prepare(self) -> None:
        """Sets up what the subclass keeps, before it is resumed."""

    def metrics_of_step(self, *batch: Tensor) -> dict[str, Tensor]:
        """One update on a batch, `update` among it; returns its metrics without waiting for the device."""
        raise NotImplementedError

    def told(self, records: list[dict[str, Any]]) -> None:
        """Adds to the records of the last steps what is made of them on the host."""

    def scores(self) -> dict[str, float]:
        """What the model does on what it was not trained on."""
        raise NotImplementedError

    def postfix(self, record: dict[str, Any]) -> str:
        """Of the progress bar."""
        raise NotImplementedError

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All that is trained."""
        return self.model.named_parameters()

    def state(self) -> dict[str, Any]:
        """What the subclass keeps, for a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave."""

    def run(self, until: int | None = None) -> None:
        """Trains up to step `until`, or to the end."""
        stop = self.config.steps if until is None else min(until, self.config.steps)
        items: Any = self.train
        sampler = StepSampler(len(items), self.config.batch_size, seed=self.config.seed, start=self.step, stop=stop)
        loader = DataLoader(
            items,
            batch_sampler=sampler,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or else it would draw from the global one, which resuming has just set
        )
        with deferred_interruption() as interrupted, self._progress_bar() as bar:
            self.window_start = time.perf_counter()
            for batch in loader:
                tensors = batch if isinstance(batch, (list, tuple)) else [batch]
                self.pending.append(self._train_step(*(t.to(self.device, non_blocking=True) for t in tensors)))
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
            if interrupted.is_set():  # while the last step was scored or saved: what follows this run is not to begin
                raise KeyboardInterrupt

    def _train_step(self, *batch: Tensor) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        return self.metrics_of_step(*batch)

    def update(self, loss: Tensor) -> Tensor:
        """The optimizer's step down the gradient of `loss`; returns the gradient's norm before it was clipped."""
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.step += 1
        return grad_norm

    def _due(self, *intervals: int) -> bool:
        return any(self.step % interval == 0 for interval in intervals)

    def _log(self, bar: tqdm, *, held_out: bool) -> None:
        """Brings the metrics since the last call over in one transfer, judges them and writes them down."""
        on_device = torch.stack([metric.double() for metrics in self.pending for metric in metrics.values()])
        values = on_device.view(len(self.pending), -1).tolist()
        seconds = (time.perf_counter() - self.window_start) / len(values)
        first = self.step - len(values) + 1
        records: list[dict[str, Any]] = []
        for step, row in enumerate(values, first):
            records.append({"step": step} | dict(zip(self.pending[0], row, strict=True)))
            self._require_finite(records[-1])
        self.told(records)
        for record in records:
            record["step_seconds"] = seconds
        self.pending.clear()
        if held_out:
            records[-1] |= {f"held_out_{name}": value for name, value in self.scores().items()}
        log.append(self.log_file, records)
        bar.set_postfix_str(self.postfix(records[-1]))
        self.window_start = time.perf_counter()

    def _require_finite(self, record: dict[str, float]) -> None:
        wrong = [f"{name} is {record[name]}" for name in self.watched if not math.isfinite(record[name])]
        if not wrong:
            return
        spoiled = [name for name, p in self.named_parameters() if not p.isfinite().all()]
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
            **self.state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
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
        self.load_state(state)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        log.rewind(self.log_file, self.step)

    def _progress_bar(self) -> tqdm:
        return tqdm(total=self.config.steps, initial=self.step, desc=self.folder.name, unit="step", dynamic_ncols=True)


def require_same_run(saved: dict, asked: dict, folder: Path) -> None:
    different = []
    for section in sorted(asked.keys() | saved.keys()):
        was, now = saved.get(section, {}), asked.get(section, {})
        different += [
            f"{section}.{name} was {was.get(name)!r}, now {now.get(name)!r}"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]
    if different:
        raise ValueError(
            f"--out {folder} holds a run with other settings ({'; '.join(different)}): "
            "give those settings or another --out, or start over with --no-resume"
        )
