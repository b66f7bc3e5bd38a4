from mmgen.training.codes import CausalCodeTrainer, CodeDiffusionTrainer, CodeTrainer, CodeTrainingConfig
from mmgen.training.diffusion import DiTTrainer, DiTTrainingConfig
from mmgen.training.loop import Trainer, TrainingConfig
from mmgen.training.vqvae import VQVAETrainer, VQVAETrainingConfig

__all__ = [
    "CausalCodeTrainer",
    "CodeDiffusionTrainer",
    "CodeTrainer",
    "CodeTrainingConfig",
    "DiTTrainer",
    "DiTTrainingConfig",
    "Trainer",
    "TrainingConfig",
    "VQVAETrainer",
    "VQVAETrainingConfig",
]
