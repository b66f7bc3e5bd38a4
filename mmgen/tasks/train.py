"""Trains one model, or goes on where the last run in the same folder stopped."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmgen.data import labelled_digits, load
from mmgen.models import VQVAE, AutoencoderKL, CodeDiffusion, CodeTransformer, DiT, VQVAEConfig
from mmgen.presets import CodeDiffusionExperiment, CodeExperiment, DiTExperiment, Experiment, VAEExperiment, VQGANExperiment
from mmgen.training import (
    CausalCodeTrainer,
    CodeDiffusionTrainer,
    CodeTrainer,
    DiTTrainer,
    Trainer,
    VAETrainer,
    VQGANTrainer,
    VQVAETrainer,
    checkpoint,
)


def trainer(experiment: Experiment, folder: Path, device: torch.device) -> VQVAETrainer:
    """Model, data and optimizers of a VQ-VAE or a VQGAN, the last checkpoint in `folder` loaded if there is one."""
    data = load(experiment.data, experiment.training.seed)
    torch.manual_seed(experiment.training.seed)
    kind = VQGANTrainer if isinstance(experiment, VQGANExperiment) else VQVAETrainer
    return kind(
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


def vae_trainer(experiment: VAEExperiment, folder: Path, device: torch.device) -> VAETrainer:
    data = load(experiment.data, experiment.training.seed)
    torch.manual_seed(experiment.training.seed)
    model = AutoencoderKL(experiment.model)
    return VAETrainer(model, data, experiment.training, folder, settings=experiment.settings, device=device)


def train_vae(experiment: VAEExperiment, folder: Path, *, device: torch.device, resume: bool = True) -> VAETrainer:
    if not resume:
        start_over(folder)
    return finished(vae_trainer(experiment, folder, device))


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


def read_tokenizer(folder: Path, option: str) -> tuple[VQVAE, dict, Path]:
    """The tokenizer that a run has trained last, the settings of the run, and the checkpoint that was read."""
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        raise FileNotFoundError(f"{option} must be a folder that train has written to, got {str(folder)!r}")
    saved = checkpoint.read_config(last)
    if "codebook_size" not in saved["model"]:
        raise ValueError(f"{option} must hold a VQ-VAE, got {str(folder)!r}, which holds another model")
    tokenizer = VQVAE(VQVAEConfig(**saved["model"] | {"channels": tuple(saved["model"]["channels"])}))
    tokenizer.load_state_dict(checkpoint.read_weights(last))
    return tokenizer, saved, last


def keep_tokenizer(last: Path, folder: Path) -> None:
    """Copies a checkpoint in the place of the one that `folder` holds, whole or not at all; it may be that very one."""
    if folder.resolve() in last.resolve().parents:
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(last, partial / "checkpoints" / last.name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def code_trainer(experiment: CodeExperiment, tokenizer: Path, folder: Path, device: torch.device) -> CodeTrainer:
    """`tokenizer` is the folder of its run; the new one keeps a copy of the weights, to draw pictures without the other."""
    vqvae, _, last = read_tokenizer(tokenizer, "--tokenizer")
    data = load(experiment.data, experiment.training.seed)
    torch.manual_seed(experiment.training.seed)
    options: dict[str, Any] = {"settings": experiment.settings, "device": device}
    run: CodeTrainer
    if isinstance(experiment, CodeDiffusionExperiment):
        model = CodeDiffusion(experiment.model)
        run = CodeDiffusionTrainer(model, vqvae, data, experiment.training, folder, process=experiment.process, **options)
    else:
        run = CausalCodeTrainer(CodeTransformer(experiment.model), vqvae, data, experiment.training, folder, **options)
    keep_tokenizer(last, folder / "tokenizer")
    return run


def train_codes(
    experiment: CodeExperiment,
    tokenizer: Path,
    folder: Path,
    *,
    device: torch.device,
    resume: bool = True,
    until: int | None = None,
) -> CodeTrainer:
    if tokenizer.resolve() == folder.resolve():
        raise ValueError(f"--out must be another folder than --tokenizer, got {str(folder)!r} for both")
    if not resume:
        start_over(folder)
    return finished(code_trainer(experiment, tokenizer, folder, device), until)


RUN = TypeVar("RUN", bound=Trainer)


def finished(run: RUN, until: int | None = None) -> RUN:
    if run.step:
        print(f"{run.folder}: going on after step {run.step} of {run.config.steps}")
    run.run(until)
    return run


def start_over(folder: Path) -> None:
    """Removes what a run of ours left in `folder`, and nothing else."""
    checkpoints, removed = folder / "checkpoints", folder / "checkpoints.removed"
    shutil.rmtree(removed, ignore_errors=True)  # of a removal that was cut
    if checkpoints.exists():
        checkpoints.rename(removed)  # at once: no half of one is ever gone on with
        shutil.rmtree(removed)
    (folder / "log.jsonl").unlink(missing_ok=True)


def with_quantizer(experiment: Experiment, quantizer: str) -> Experiment:
    return replace(experiment, model=replace(experiment.model, quantizer=quantizer))
