"""Experiments as plain functions: the starting point that the command line's options change."""

import json
from dataclasses import asdict, dataclass

from mmgen.data import DataConfig
from mmgen.models import VQVAEConfig
from mmgen.training import TrainingConfig


@dataclass(frozen=True)
class Experiment:
    data: DataConfig
    model: VQVAEConfig
    training: TrainingConfig

    def __post_init__(self):
        if self.data.image_size % self.model.downsampling:
            raise ValueError(
                f"--image-size must be divisible by {self.model.downsampling}, the pixels per token, "
                f"got {self.data.image_size}"
            )

    @property
    def settings(self) -> dict[str, dict]:
        """As JSON gives it back, tuples as lists, so that what is read compares equal to what was written."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def tokens(self) -> int:
        """Rows that the quantizer gets in one training step."""
        return self.training.batch_size * (self.data.image_size // self.model.downsampling) ** 2


def photographs() -> Experiment:
    """64 x 64 crops, 256 tokens each, 2048 per step: two cores train it to recognisable pictures in a minute or two."""
    return Experiment(DataConfig("photographs"), VQVAEConfig(), TrainingConfig())


def folder(path: str) -> Experiment:
    """The same model on the user's own pictures."""
    return Experiment(DataConfig("folder", path=path), VQVAEConfig(), TrainingConfig())


def digits() -> Experiment:
    """32 x 32 digits, 64 tokens each, 2048 per step."""
    return Experiment(DataConfig("digits", image_size=32), VQVAEConfig(in_channels=1), TrainingConfig(batch_size=32))
