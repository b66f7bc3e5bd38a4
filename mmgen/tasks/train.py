"""Trains one model, or goes on where the last run in the same folder stopped."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from mmgen.data import labelled_digits, load
from mmgen.models import VQVAE, DiT
from mmgen.presets import DiTExperiment, Experiment
from mmgen.training import DiTTrainer, Trainer, VQVAETrainer


def trainer(experiment: Experiment, folder: Path, device: torch.device) -> VQVAETrainer:
    """Model, data and optimizer of an experiment, the last checkpoint in `folder` loaded if there is one."""
    data = load(experiment.data, experiment.training.seed)
    torch.manual_seed(experiment.training.seed)
    return VQVAETrainer(
        VQVAE(experiment.model),
        data,
        experiment.training,
        folder,
        settings=experiment.settings,
        device=device,
    )


def train(experiment: Experiment, folder: Path, *, device: torch.device, resume: bool = True) -> VQVAETrainer:
    if not resume:
        start_over(folder)
    return finished(trainer(experiment, folder, device))


def dit_trainer(experiment: DiTExperiment, folder: Path, device: torch.device) -> DiTTrainer:
    torch.manual_seed(experiment.training.seed)
    return DiTTrainer(
        DiT(experiment.model),
        labelled_digits(experiment.model.input_size),
        experiment.objective,
        experiment.training,
        folder,
        settings=experiment.settings,
        device=device,
    )


def train_dit(experiment: DiTExperiment, folder: Path, *, device: torch.device, resume: bool = True) -> DiTTrainer:
    if not resume:
        start_over(folder)
    return finished(dit_trainer(experiment, folder, device))


RUN = TypeVar("RUN", bound=Trainer)


def finished(run: RUN) -> RUN:
    if run.step:
        print(f"{run.folder}: going on after step {run.step} of {run.config.steps}")
    run.run()
    return run


def start_over(folder: Path) -> None:
    """Removes what a run of ours left in `folder`, and nothing else."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "log.jsonl").unlink(missing_ok=True)


def with_quantizer(experiment: Experiment, quantizer: str) -> Experiment:
    return replace(experiment, model=replace(experiment.model, quantizer=quantizer))
