"""Trains one VQ-VAE twice from the same seed on the same batches, with the stock quantizer and with ours."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from mmgen.presets import Experiment
from mmgen.tasks import report
from mmgen.tasks.comparison import Comparison, agreement, as_text, compare, side, table
from mmgen.tasks.train import train, with_quantizer
from mmgen.training import log


def demo(experiment: Experiment, out: Path, *, device: torch.device, resume: bool = True) -> Comparison:
    """Leaves a folder per run, results.json and report.html in `out`; runs that are there already are gone on with."""
    runs = {
        quantizer: train(with_quantizer(experiment, quantizer), out / quantizer, device=device, resume=resume)
        for quantizer in ("stock", "fused")
    }
    logs = {quantizer: log.read(run.log_file) for quantizer, run in runs.items()}
    stock, ours = (side(run.model, logs[quantizer], experiment.tokens, device) for quantizer, run in runs.items())
    comparison = compare(stock, ours, logs["stock"], logs["fused"])
    (out / "results.json").write_text(json.dumps(asdict(comparison), indent=2) + "\n")
    models = {quantizer: run.model for quantizer, run in runs.items()}
    (out / "report.html").write_text(report.page(comparison, experiment, runs["stock"].data, models, logs, device))
    print(f"\n{as_text(table(comparison))}\n\n{agreement(comparison)}\nPictures and curves: {out / 'report.html'}")
    return comparison
