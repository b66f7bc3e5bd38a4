"""Experiments as plain functions: the starting point that the command line's options change."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from mmgen.data import DataConfig
from mmgen.diffusion import ObjectiveConfig
from mmgen.diffusion.codes import AbsorbingConfig
from mmgen.diffusion.mask_and_replace import MaskAndReplaceConfig
from mmgen.models import (
    AutoencoderConfig,
    AutoencoderKLConfig,
    CodeDiffusionConfig,
    CodeTransformerConfig,
    DiscriminatorConfig,
    DiTConfig,
    VQVAEConfig,
)
from mmgen.training import (
    CodeTrainingConfig,
    DiTTrainingConfig,
    TrainingConfig,
    VAETrainingConfig,
    VQGANTrainingConfig,
    VQVAETrainingConfig,
)


class Settings:
    """Of an experiment, as JSON gives them back, tuples as lists: what is read compares equal to what was written."""

    @property
    def settings(self) -> dict[str, dict]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]


@dataclass(frozen=True)
class ImageExperiment(Settings):
    """An autoencoder of images."""

    data: DataConfig
    model: AutoencoderConfig
    training: TrainingConfig

    def __post_init__(self):
        if self.data.image_size % self.model.downsampling:
            raise ValueError(
                f"--image-size must be divisible by {self.model.downsampling}, the pixels per token, "
                f"got {self.data.image_size}"
            )


@dataclass(frozen=True)
class Experiment(ImageExperiment):
    """A VQ-VAE."""

    model: VQVAEConfig
    training: VQVAETrainingConfig

    @property
    def tokens(self) -> int:
        """Rows that the quantizer gets in one training step."""
        return self.training.batch_size * (self.data.image_size // self.model.downsampling) ** 2


def photographs() -> Experiment:
    """64 x 64 crops, 256 tokens each, 2048 per step: two cores train it to recognisable pictures in a minute or two."""
    return Experiment(DataConfig("photographs"), VQVAEConfig(), VQVAETrainingConfig())


def unseen_photographs() -> Experiment:
    """The tokenizer of `codes`: few codes, so that nine photographs tell how they follow each other; whole photographs held out."""
    return Experiment(DataConfig("unseen-photographs"), VQVAEConfig(codebook_size=512), VQVAETrainingConfig(steps=600))


def folder(path: str) -> Experiment:
    """The same model on the user's own pictures."""
    return Experiment(DataConfig("folder", path=path), VQVAEConfig(), VQVAETrainingConfig())


def digits() -> Experiment:
    """32 x 32 digits, 64 tokens each, 2048 per step."""
    return Experiment(DataConfig("digits", image_size=32), VQVAEConfig(in_channels=1), VQVAETrainingConfig(batch_size=32))


def require_patch(data: DataConfig, training: VQGANTrainingConfig | VAETrainingConfig) -> None:
    smallest = DiscriminatorConfig(num_layers=training.disc_layers).smallest_image
    if training.disc_weight > 0 and data.image_size < smallest:
        raise ValueError(
            f"--image-size must be at least {smallest}, of which a discriminator has one patch, or --disc-weight 0 for none, "
            f"got {data.image_size}"
        )


@dataclass(frozen=True)
class VQGANExperiment(Experiment):
    """A VQ-VAE against a discriminator."""

    training: VQGANTrainingConfig

    def __post_init__(self):
        super().__post_init__()
        require_patch(self.data, self.training)


@dataclass(frozen=True)
class VAEExperiment(ImageExperiment):
    """An autoencoder with Gaussian latents against a discriminator."""

    model: AutoencoderKLConfig
    training: VAETrainingConfig

    def __post_init__(self):
        super().__post_init__()
        require_patch(self.data, self.training)


CHANNELS = (24, 48, 48)  # an eighth of the pixels along each side, where a squared error leaves blur for a discriminator to find


def vqgan(base: Experiment) -> VQGANExperiment:
    """On the data of a VQ-VAE's preset: 64 tokens of a 64 x 64 crop."""
    model = VQVAEConfig(in_channels=base.model.in_channels, channels=CHANNELS, attention=True, codebook_size=1024)
    return VQGANExperiment(base.data, model, VQGANTrainingConfig(batch_size=base.training.batch_size))


def vae(base: Experiment) -> VAEExperiment:
    """On the same data, with the same encoder and decoder: latents of 8 x 8 with 4 channels of a 64 x 64 crop."""
    model = AutoencoderKLConfig(in_channels=base.model.in_channels, channels=CHANNELS, attention=True)
    return VAEExperiment(base.data, model, VAETrainingConfig(batch_size=base.training.batch_size))


def tokenizers() -> VQGANExperiment:
    """The comparison's VQGAN: 32 x 32 crops with 64 tokens each, 1024 per step.

    Many small crops rather than few large ones: a discriminator that sees four crops a step, half of them sky, learns nothing.
    Nor does one that is heard for two hundred steps only: 300 steps in all were as sharp without it.
    """
    base = vqgan(photographs())
    training = replace(
        base.training,
        steps=2000,
        batch_size=16,
        final_learning_rate=0.2,
        disc_start=600,
        disc_warmup=200,
        disc_channels=16,
        eval_every=100,
        checkpoint_every=100,
    )
    model = replace(base.model, channels=CHANNELS[:2])
    return replace(base, data=replace(base.data, image_size=32), model=model, training=training)


AUTOENCODERS: dict[str, Callable[[Experiment], ImageExperiment]] = {"vqvae": lambda base: base, "vqgan": vqgan, "vae": vae}


@dataclass(frozen=True)
class SamplingConfig:
    samples: int = 1000
    num_inference_steps: int = 25
    guidance_scale: float = 1.3  # less covers more of the digits' variety, more is clearer
    seed: int = 0

    def __post_init__(self):
        for name in ("samples", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2^63 - 1, got {self.seed}")


@dataclass(frozen=True)
class DiTExperiment(Settings):
    """A Diffusion Transformer of digits."""

    model: DiTConfig
    objective: ObjectiveConfig
    training: DiTTrainingConfig


def digits_dit() -> DiTExperiment:
    """The 8 x 8 digits as they are, 16 tokens each."""
    model = DiTConfig(
        input_size=8, in_channels=1, patch_size=2, hidden_size=128, depth=4, num_heads=4, num_classes=10, learn_sigma=False
    )
    return DiTExperiment(model, ObjectiveConfig(), DiTTrainingConfig())


@dataclass(frozen=True)
class CodeExperiment(Settings):
    """A model of a tokenizer's codes; here a causal one."""

    data: DataConfig
    tokenizer: VQVAEConfig
    model: CodeTransformerConfig
    training: CodeTrainingConfig


@dataclass(frozen=True)
class CodeDiffusionExperiment(CodeExperiment):
    model: CodeDiffusionConfig
    process: AbsorbingConfig


@dataclass(frozen=True)
class CodeComparison(Settings):
    tokenizer: Experiment
    causal: CodeExperiment
    diffusion: CodeDiffusionExperiment
    mask_and_replace: CodeDiffusionExperiment
    replicates: int = 32  # of the numbers that a diffusion model's bound is drawn with
    until: int | None = None  # all models stop there, on the way to their steps

    def __post_init__(self):
        every = self.causal.training.eval_every
        if self.until is not None and (self.until < 1 or self.until % every):
            raise ValueError(f"--until must be a multiple of {every}, the steps from one score to the next, got {self.until}")
        if self.replicates < 2:
            raise ValueError(f"--replicates must be at least 2, for a standard error, got {self.replicates}")


@dataclass(frozen=True)
class CodeSamplingConfig:
    samples: int = 20
    num_inference_steps: int = 256  # of the diffusion model, and below
    order: str = "chance"
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("samples", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must not be negative, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2^63 - 1, got {self.seed}")


def with_replaced(experiment: CodeDiffusionExperiment, replaced: float) -> CodeDiffusionExperiment:
    """The same with a process that replaces codes besides hiding them."""
    process = MaskAndReplaceConfig(num_timesteps=experiment.process.num_timesteps, replaced=replaced)
    return replace(experiment, process=process)


def codes(kind: str, data: DataConfig, tokenizer: VQVAEConfig) -> CodeExperiment:
    """0.98 M parameters, be it "causal", "diffusion" or "mask_and_replace", the same network by another process.

    The first has wider MLPs for what the others spend on their time.
    """
    shape = {"num_codes": tokenizer.codebook_size, "code_dim": tokenizer.codebook_dim}
    shape |= {"grid_size": data.image_size // tokenizer.downsampling}
    if kind == "causal":
        return CodeExperiment(data, tokenizer, CodeTransformerConfig(**shape, mlp_ratio=4.4375), CodeTrainingConfig())
    process = MaskAndReplaceConfig() if kind == "mask_and_replace" else AbsorbingConfig()
    return CodeDiffusionExperiment(data, tokenizer, CodeDiffusionConfig(**shape), CodeTrainingConfig(), process)
