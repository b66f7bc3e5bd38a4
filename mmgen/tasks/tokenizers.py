"""Autoencoders of one encoder and decoder, trained on the same batches: a VQ-VAE, a VQGAN with and without its discriminator, and a
KL autoencoder with it.
"""

import html
import io
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import mmgen_kernels as mk
from mmgen.evaluation import evaluate, frechet_distance
from mmgen.evaluation.features import patch_features
from mmgen.models import AutoencoderKLConfig
from mmgen.presets import Experiment, ImageExperiment, VAEExperiment, VQGANExperiment
from mmgen.tasks.comparison import as_text
from mmgen.tasks.reconstructions import reconstructions, save_picture
from mmgen.tasks.report import device_name, embedded, picture_tag, table_rows
from mmgen.tasks.train import train, train_vae
from mmgen.training import AdversarialConfig, AutoencoderTrainer, VAETrainingConfig, VQVAETrainingConfig, log

PLAIN, UNJUDGED, VQGAN, VAE = "VQ-VAE", "VQGAN, no discriminator", "VQGAN", "KL autoencoder"
SHOWN = {PLAIN: "VQ-VAE", VQGAN: "VQGAN", VAE: "KL autoencoder"}  # rows of the picture, below the originals

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>mmgen tokenizers</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem 1rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ width: 100%; }}
pre {{ background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: 13px; }}
</style>
<h1>Tokenizers of photographs</h1>
<table>{table}</table>
<p>Held-out crops of seed {seed}. From above: original, {shown}.</p>
{picture}
{curves}
<pre>{facts}</pre>
</html>
"""


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
    start = time.process_time()
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
        "stamp": stamp(device) | {"cpu_seconds": round(time.process_time() - start)},
        "settings": base.settings,
        "scores": {name: {seed: asdict(value) for seed, value in of.items()} for name, of in found.items()},
    }
    (out / "tokenizers.json").write_text(json.dumps(result, indent=1) + "\n")
    picture = reconstructions(first[PLAIN].data, [first[name].model for name in SHOWN])
    save_picture(picture, out / "tokenizers.png")
    page = PAGE.format(
        table=table_rows(table(result)),
        seed=seeds[0],
        shown=", ".join(SHOWN.values()),
        picture=picture_tag(picture),
        curves=curves(first),
        facts=html.escape(json.dumps({"stamp": result["stamp"], "settings": result["settings"]}, indent=1)),
    )
    (out / "report.html").write_text(page)
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
    heading = ("", "detail, 1 is the original's", "Frechet distance of patches", "PSNR, dB", "codes used", "perplexity")
    rows = [
        (
            name,
            spread([s["detail"] for s in by_seed.values()], ".2f"),
            spread([s["frechet_distance"] for s in by_seed.values()], ".3f"),
            spread([s["psnr"] for s in by_seed.values()], ".2f"),
            spread([s["usage"] for s in by_seed.values()], ".0%"),
            spread([s["perplexity"] for s in by_seed.values()], ".0f"),
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


CURVES = {
    "held_out_detail": "detail of held-out reconstructions",
    "held_out_psnr": "PSNR of held-out reconstructions, dB",
    "adaptive_weight": "adaptive weight",
    "disc_loss": "discriminator's loss",
}


def curves(runs: dict[str, AutoencoderTrainer]) -> str:
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for name, run in runs.items():
            points = {r["step"]: r[key] for r in log.read(run.log_file) if key in r}
            if any(points.values()):
                axes.plot([*points], [*points.values()], label=name, linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return embedded(file)
