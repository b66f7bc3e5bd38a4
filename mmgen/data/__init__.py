from mmgen.data.sampler import StepSampler
from mmgen.data.sources import DATASETS, Data, DataConfig, LabelledData, labelled_digits, load

__all__ = ["DATASETS", "Data", "DataConfig", "LabelledData", "StepSampler", "labelled_digits", "load"]
