from mmgen.training.adversarial import AdversarialConfig, AdversarialTrainer
from mmgen.training.autoencoder import AutoencoderTrainer
from mmgen.training.codes import CausalCodeTrainer, CodeDiffusionTrainer, CodeTrainer, CodeTrainingConfig
from mmgen.training.diffusion import DiTTrainer, DiTTrainingConfig
from mmgen.training.loop import Trainer, TrainingConfig
from mmgen.training.vae import VAETrainer, VAETrainingConfig
from mmgen.training.vqgan import VQGANTrainer, VQGANTrainingConfig
from mmgen.training.vqvae import VQVAETrainer, VQVAETrainingConfig

__all__ = [
    "AdversarialConfig",
    "AdversarialTrainer",
    "AutoencoderTrainer",
    "CausalCodeTrainer",
    "CodeDiffusionTrainer",
    "CodeTrainer",
    "CodeTrainingConfig",
    "DiTTrainer",
    "DiTTrainingConfig",
    "Trainer",
    "TrainingConfig",
    "VAETrainer",
    "VAETrainingConfig",
    "VQGANTrainer",
    "VQGANTrainingConfig",
    "VQVAETrainer",
    "VQVAETrainingConfig",
]
