from mmgen.evaluation.held_out import evaluate, reconstruct
from mmgen.evaluation.metrics import code_counts, perplexity, psnr, usage
from mmgen.evaluation.samples import SampleScores, evaluate_samples, frechet_distance

__all__ = [
    "SampleScores",
    "code_counts",
    "evaluate",
    "evaluate_samples",
    "frechet_distance",
    "perplexity",
    "psnr",
    "reconstruct",
    "usage",
]
