from mmgen.training.loop import Trainer, TrainingConfig

__all__ = ["Trainer", "TrainingConfig"]
