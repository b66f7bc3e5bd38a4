from mmgen.evaluation.held_out import evaluate, reconstruct
from mmgen.evaluation.metrics import code_counts, decibels, detail, perplexity, psnr, usage
from mmgen.evaluation.samples import SampleScores, evaluate_samples, frechet_distance

__all__ = [
    "SampleScores",
    "code_counts",
    "decibels",
    "detail",
    "evaluate",
    "evaluate_samples",
    "frechet_distance",
    "perplexity",
    "psnr",
    "reconstruct",
    "usage",
]
