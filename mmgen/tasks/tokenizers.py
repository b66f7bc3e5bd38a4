"""Autoencoders of one encoder and decoder, trained on the same batches: a VQ-VAE, a VQGAN with and without its discriminator, and a
KL autoencoder with it.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import mmgen_kernels as mk
from mmgen.evaluation import evaluate, frechet_distance
from mmgen.evaluation.features import patch_features
from mmgen.models import AutoencoderKLConfig
from mmgen.presets import Experiment, ImageExperiment, VAEExperiment, VQGANExperiment
from mmgen.tasks import tokenizers_report
from mmgen.tasks.comparison import as_text
from mmgen.tasks.reconstructions import reconstructions, save_picture
from mmgen.tasks.report import device_name
from mmgen.tasks.train import train, train_vae, trainer, vae_trainer
from mmgen.training import AdversarialConfig, AutoencoderTrainer, VAETrainingConfig, VQVAETrainingConfig

PLAIN, UNJUDGED, VQGAN, VAE = "VQ-VAE", "VQGAN, no discriminator", "VQGAN", "KL autoencoder"
TIMED_STEPS = 4
SHOWN = {PLAIN: "VQ-VAE", VQGAN: "VQGAN", VAE: "KL autoencoder"}  # rows of the picture, below the originals


@dataclass(frozen=True)
class Scores:
    """Of the held-out crops' reconstructions."""

    detail: float  # energy in waves shorter than four pixels, as a share of the originals': 1 is as sharp
    frechet_distance: float  # of the features of small patches, to the originals
    psnr: float  # dB
    usage: float | None = None  # of the codebook; a KL autoencoder has none
    perplexity: float | None = None


def experiments(base: VQGANExperiment) -> dict[str, ImageExperiment]:
    """The four, of the same data, encoder, decoder, steps, batches and seed."""
    codebook = {field.name: getattr(base.training, field.name) for field in fields(VQVAETrainingConfig)}
    game = {field.name: getattr(base.training, field.name) for field in fields(AdversarialConfig)}
    latents = {name: getattr(base.model, name) for name in ("in_channels", "patch_size", "channels", "num_res_blocks", "attention")}
    return {
        PLAIN: Experiment(base.data, base.model, VQVAETrainingConfig(**codebook)),
        UNJUDGED: replace(base, training=replace(base.training, disc_weight=0.0)),
        VQGAN: base,
        VAE: VAEExperiment(base.data, AutoencoderKLConfig(**latents), VAETrainingConfig(**game)),
    }


def tokenizers(
    base: VQGANExperiment, seeds: Sequence[int], out: Path, *, device: torch.device, resume: bool = True
) -> dict[str, Any]:
    """Leaves a folder per run, tokenizers.json, tokenizers.png and report.html in `out`; runs that are there are gone on with."""
    found: dict[str, dict[str, Scores]] = {}  # by model and seed
    first: dict[str, AutoencoderTrainer] = {}
    for seed in seeds:
        seeded = replace(base, training=replace(base.training, seed=seed))
        for name, experiment in experiments(seeded).items():
            folder = out / f"{name.lower().replace(',', '').replace(' ', '-')}-{seed}"
            make: Any = train_vae if isinstance(experiment, VAEExperiment) else train
            run = make(experiment, folder, device=device, resume=resume)
            found.setdefault(name, {})[str(seed)] = scores(run)
            first.setdefault(name, run)
            print(f"{name}, seed {seed}: {found[name][str(seed)]}")
    result = {
        "stamp": stamp(device),
        "settings": base.settings,
        "cpu_seconds_per_step": {name: cpu_seconds_per_step(kind, device) for name, kind in experiments(base).items()},
        "scores": {name: {seed: asdict(value) for seed, value in of.items()} for name, of in found.items()},
    }
    (out / "tokenizers.json").write_text(json.dumps(result, indent=1) + "\n")
    picture = reconstructions(first[PLAIN].data, [first[name].model for name in SHOWN])
    save_picture(picture, out / "tokenizers.png")
    (out / "report.html").write_text(tokenizers_report.page(result, table(result), seeds[0], list(SHOWN.values()), picture, first))
    print(f"\n{as_text(table(result))}\n\nPictures and curves: {out / 'report.html'}")
    return result


@torch.no_grad()
def scores(run: AutoencoderTrainer) -> Scores:
    data, model, device = run.data.held_out, run.model, run.device
    images = torch.stack([data[i] for i in range(len(data))]).to(device)  # (N, C, S, S)
    size = run.config.batch_size
    of_images, of_reconstructions = (
        torch.cat([patch_features(part) for part in pictures.split(size)])
        for pictures in (images, torch.cat([model(part).image.clamp(-1, 1) for part in images.split(size)]))
    )
    values = evaluate(model, data, batch_size=size, device=device)
    values.pop("tokens", None)
    return Scores(frechet_distance=frechet_distance(of_reconstructions, of_images), **values)


def cpu_seconds_per_step(experiment: ImageExperiment, device: torch.device) -> float:
    """The least of a few steps of a fresh model with all players in the game; other programs on the machine do not count."""
    with tempfile.TemporaryDirectory() as folder:
        make: Any = vae_trainer if isinstance(experiment, VAEExperiment) else trainer
        run = make(experiment, Path(folder), device)
        images = torch.stack([run.train[i] for i in range(run.config.batch_size)]).to(device)  # (B, C, S, S)
        run.step = max(run.config.steps - TIMED_STEPS, 0)
        seconds = []
        for _ in range(TIMED_STEPS):
            start = time.process_time()
            run.metrics_of_step(images)["loss"].item()  # waits for the device
            seconds.append(time.process_time() - start)
    return min(seconds)


def stamp(device: torch.device) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmgen_kernels": mk.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of what and its scores, means over the seeds with the least and the greatest; the first is the heading."""
    heading = ("", "detail, 1 is the original's", "Frechet distance", "PSNR, dB", "codes used", "perplexity", "CPU s per step")
    rows = [
        (
            name,
            spread([s["detail"] for s in by_seed.values()], ".3f"),
            spread([s["frechet_distance"] for s in by_seed.values()], ".3f"),
            spread([s["psnr"] for s in by_seed.values()], ".2f"),
            spread([s["usage"] for s in by_seed.values()], ".0%"),
            spread([s["perplexity"] for s in by_seed.values()], ".0f"),
            f"{result['cpu_seconds_per_step'][name]:.3f}",
        )
        for name, by_seed in result["scores"].items()
    ]
    return [heading, *rows]


def spread(values: list[float | None], form: str) -> str:
    """Mean, and of several seeds the range."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "none"
    mean, least, most = (format(value, form) for value in (statistics.fmean(numbers), min(numbers), max(numbers)))
    return mean if len(numbers) == 1 else f"{mean} ({least} to {most})"


def markdown(result: dict[str, Any]) -> str:
    """The table, as docs/tokenizers.md has it."""
    heading, *rows = table(result)
    lines = [heading, ("---", *["---:"] * (len(heading) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
