from mmgen.data.sampler import StepSampler
from mmgen.data.sources import DATASETS, Data, DataConfig, load

__all__ = ["DATASETS", "Data", "DataConfig", "StepSampler", "load"]
