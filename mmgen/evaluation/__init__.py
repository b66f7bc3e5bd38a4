from mmgen.evaluation.held_out import evaluate, reconstruct
from mmgen.evaluation.metrics import code_counts, perplexity, psnr, usage

__all__ = ["code_counts", "evaluate", "perplexity", "psnr", "reconstruct", "usage"]
