"""A Diffusion Transformer of digits: trained, sampled and scored, its training step timed with kernels and without."""

import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import mmgen_kernels as mk
from mmgen.data.crops import to_pixels
from mmgen.diffusion import ObjectiveConfig, sample
from mmgen.evaluation import SampleScores, evaluate_samples
from mmgen.models import DiT, DiTConfig
from mmgen.presets import DiTExperiment, SamplingConfig
from mmgen.tasks.train import dit_trainer, train_dit
from mmgen.training import DiTTrainer, DiTTrainingConfig, checkpoint
from mmgen.training.diffusion import DRAWN

ROUNDS, STEPS_OF_A_ROUND = 7, 3
BATCH = 250  # samples drawn at once


@dataclass(frozen=True)
class Speed:
    """Training steps per second; the median of rounds in turns."""

    plain: float  # kernels off: the same operators in plain PyTorch
    ours: float


@dataclass(frozen=True)
class Digits:
    speed: Speed
    scores: SampleScores
    samples_per_second: float


def digits(
    experiment: DiTExperiment, sampling: SamplingConfig, folder: Path, *, device: torch.device, resume: bool = True
) -> tuple[Digits, DiTTrainer, Tensor]:
    """The result, the run, and the samples (N, C, S, S) in [-1, 1], class after class in turns."""
    run = train_dit(experiment, folder, device=device, resume=resume)
    labels = torch.arange(sampling.samples) % experiment.model.num_classes
    start = time.perf_counter()
    samples = draw(run.ema, labels, experiment, sampling, device)
    seconds = time.perf_counter() - start
    scores = evaluate_samples(samples, labels, run.data)
    return Digits(speed(experiment, device), scores, len(samples) / seconds), run, samples


def draw(
    model: DiT, labels: Tensor, experiment: DiTExperiment, sampling: SamplingConfig, device: torch.device, scheduler: Any = None
) -> Tensor:
    """Images (N, C, S, S) in [-1, 1] of labels (N,), on the CPU; by the objective's own scheduler if none is given."""
    key = mk.fold_in(torch.tensor([sampling.seed, 0], device=device), DRAWN)
    parts = [
        sample(
            model,
            part.to(device),
            scheduler or experiment.objective.scheduler,
            sampling.num_inference_steps,
            key=mk.fold_in(key, i),
            guidance_scale=sampling.guidance_scale,
        )
        for i, part in enumerate(labels.split(BATCH))
    ]
    return torch.cat(parts).clamp(-1, 1).cpu()


def sample_run(
    folder: Path,
    labels: list[int] | None,
    sampling: SamplingConfig,
    out: Path,
    *,
    device: torch.device,
    scheduler: str | None = None,
) -> None:
    """Draws from the last checkpoint of a run, ten in a row, and writes one picture; `scheduler`: a name of `mk.schedulers`."""
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        raise FileNotFoundError(f"--run must be a folder that train-dit has written to, got {str(folder)!r}")
    saved = checkpoint.read_config(last)
    if "objective" not in saved:
        raise ValueError(f"--run must hold a DiT, got {str(folder)!r}, which holds another model")
    experiment = DiTExperiment(
        DiTConfig(**saved["model"]), ObjectiveConfig(**saved["objective"]), DiTTrainingConfig(**saved["training"])
    )
    classes = experiment.model.num_classes
    for label in labels or ():
        if not 0 <= label < classes:
            raise ValueError(f"--labels must be between 0 and {classes - 1}, got {label}")
    learn_sigma = experiment.model.learn_sigma
    sampler = None if scheduler is None else experiment.objective.scheduler_named(scheduler, learn_sigma=learn_sigma)
    wanted = torch.tensor(labels or range(classes))
    model = DiT(experiment.model).to(device).eval()
    model.load_state_dict(checkpoint.read_state(last)["ema"])
    images = draw(model, wanted[torch.arange(sampling.samples) % len(wanted)], experiment, sampling, device, sampler)
    Image.fromarray(to_pixels(grid(list(images.split(10))), enlarged=6)).save(out)
    print(f"{len(images)} digits of step {int(last.name.removeprefix('step-'))}: {out}")


def grid(rows: list[Tensor]) -> Tensor:
    """Rows of images (N, C, S, S) -> one image (C, H, W), with a grey line between them."""
    width = max(map(len, rows))
    padded = [F.pad(row, (0, 1, 0, 1), value=0.0) for row in rows]  # (N, C, S + 1, S + 1)
    full = [torch.cat([row, row.new_zeros(width - len(row), *row.shape[1:])]) for row in padded]
    return torch.cat([torch.cat(list(row), dim=2) for row in full], dim=1)


def speed(experiment: DiTExperiment, device: torch.device) -> Speed:
    """A fresh model takes the same steps in turns; nothing of it is kept."""
    with tempfile.TemporaryDirectory() as folder:
        run = dit_trainer(experiment, Path(folder), device)
        items = [run.train[i % len(run.data.train)] for i in range(experiment.training.batch_size)]
        images = torch.stack([image for image, _ in items]).to(device)  # (B, C, S, S)
        labels = torch.tensor([label for _, label in items], device=device)  # (B,)
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for turn in range(1 + ROUNDS):  # the first warms up
            for name, times in seconds.items():
                with mk.use_backend("reference") if name == "plain" else nullcontext():
                    start = time.perf_counter()
                    for _ in range(STEPS_OF_A_ROUND):
                        loss = run.metrics_of_step(images, labels)["loss"]
                    loss.item()  # waits for the device
                if turn:
                    times.append((time.perf_counter() - start) / STEPS_OF_A_ROUND)
    return Speed(**{name: 1 / statistics.median(times) for name, times in seconds.items()})


def table(result: Digits) -> list[tuple[str, str, str]]:
    """Rows of what, samples, and what held-out digits have; the first is the heading."""
    scores = result.scores
    return [
        ("", "samples", "real digits"),
        ("classifier sees the label", f"{scores.agreement:.1%}", f"{scores.held_out_agreement:.1%}"),
        ("Frechet distance of pixels", f"{scores.frechet_distance:.2f}", f"{scores.held_out_frechet_distance:.2f}"),
        ("distance to the nearest training digit", f"{scores.nearest_distance:.2f}", f"{scores.held_out_nearest_distance:.2f}"),
    ]


def told(result: Digits) -> str:
    faster = result.speed.ours / result.speed.plain
    return (
        f"Training steps/s: {result.speed.plain:.1f} with kernels off, {result.speed.ours:.1f} on, {faster:.2f}x. "
        f"Samples/s: {result.samples_per_second:.0f}."
    )
