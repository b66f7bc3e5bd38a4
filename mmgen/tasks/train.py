"""Trains one VQ-VAE, or goes on where the last run in the same folder stopped."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from mmgen.data import load
from mmgen.models import VQVAE
from mmgen.presets import Experiment
from mmgen.training import Trainer


def trainer(experiment: Experiment, folder: Path, device: torch.device) -> Trainer:
    """Model, data and optimizer of an experiment, the last checkpoint in `folder` loaded if there is one."""
    data = load(experiment.data, experiment.training.seed)
    torch.manual_seed(experiment.training.seed)
    return Trainer(
        VQVAE(experiment.model),
        data,
        experiment.training,
        folder,
        settings=experiment.settings,
        device=device,
    )


def train(experiment: Experiment, folder: Path, *, device: torch.device, resume: bool = True) -> Trainer:
    if not resume:
        start_over(folder)
    run = trainer(experiment, folder, device)
    if run.step:
        print(f"{folder}: going on after step {run.step} of {run.config.steps}")
    run.run()
    return run


def start_over(folder: Path) -> None:
    """Removes what a run of ours left in `folder`, and nothing else."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "log.jsonl").unlink(missing_ok=True)


def with_quantizer(experiment: Experiment, quantizer: str) -> Experiment:
    return replace(experiment, model=replace(experiment.model, quantizer=quantizer))
