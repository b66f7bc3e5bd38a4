from dataclasses import replace

import pytest
import torch

from mmgen import presets
from mmgen.presets import DiTExperiment, Experiment


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> Experiment:
    """The photographs at a size where a step takes milliseconds."""
    preset = presets.photographs()
    return Experiment(
        replace(preset.data, image_size=16),
        replace(preset.model, channels=(8, 16), codebook_size=64, codebook_dim=4),
        replace(
            preset.training,
            steps=20,
            batch_size=2,
            warmup_steps=2,
            codebook_window=4,
            log_every=5,
            eval_every=10,
            checkpoint_every=5,
        ),
    )


@pytest.fixture
def tiny_dit() -> DiTExperiment:
    """The digits with a transformer whose steps take milliseconds."""
    preset = presets.digits_dit()
    return DiTExperiment(
        replace(preset.model, hidden_size=32, depth=2, num_heads=2),
        preset.objective,
        replace(
            preset.training, steps=20, batch_size=4, warmup_steps=2, log_every=5, eval_every=10, checkpoint_every=5
        ),
    )
