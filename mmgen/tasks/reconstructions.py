"""Trains one autoencoder and shows what it makes of held-out images."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmgen.data import Data
from mmgen.data.crops import to_pixels
from mmgen.evaluation import reconstruct
from mmgen.models import Autoencoder
from mmgen.presets import Experiment, ImageExperiment, VAEExperiment
from mmgen.tasks.digits import grid
from mmgen.tasks.train import train, train_vae
from mmgen.training import AutoencoderTrainer

SHOWN = 12


def train_and_show(experiment: ImageExperiment, out: Path, *, device: torch.device, resume: bool = True) -> AutoencoderTrainer:
    """Leaves the run and reconstructions.png in `out`: held-out images, and below them their reconstructions."""
    run: AutoencoderTrainer
    if isinstance(experiment, VAEExperiment):
        run = train_vae(experiment, out, device=device, resume=resume)
    elif isinstance(experiment, Experiment):
        run = train(experiment, out, device=device, resume=resume)
    else:
        raise TypeError(f"experiment must be of a VQ-VAE, a VQGAN or a KL autoencoder, got {type(experiment).__name__}")
    picture = out / "reconstructions.png"
    save_picture(reconstructions(run.data, [run.model]), picture)
    print(f"Held-out images and their reconstructions: {picture}")
    return run


def reconstructions(data: Data, models: list[Autoencoder], shown: int = SHOWN) -> Tensor:
    """Images spread over the held-out ones, and a row below for each model, (C, H, W)."""
    images = [data.held_out[i * len(data.held_out) // shown] for i in range(shown)]
    rows = [images, *([reconstruct(model, image) for image in images] for model in models)]
    return grid([torch.stack(row) for row in rows])


def save_picture(picture: Tensor, path: Path, enlarged: int = 2) -> None:
    Image.fromarray(to_pixels(picture, enlarged)).save(path)
