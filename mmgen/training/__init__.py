from mmgen.training.diffusion import DiTTrainer, DiTTrainingConfig
from mmgen.training.loop import Trainer, TrainingConfig
from mmgen.training.vqvae import VQVAETrainer, VQVAETrainingConfig

__all__ = ["DiTTrainer", "DiTTrainingConfig", "Trainer", "TrainingConfig", "VQVAETrainer", "VQVAETrainingConfig"]
