from mmgen.diffusion.objective import Objective, ObjectiveConfig
from mmgen.diffusion.sampling import sample

__all__ = ["Objective", "ObjectiveConfig", "sample"]
