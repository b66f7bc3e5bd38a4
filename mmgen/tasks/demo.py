"""Two stages: a VQ-VAE of photographs, with the stock quantizer and with ours; then a Diffusion Transformer of digits."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from mmgen.presets import DiTExperiment, Experiment, SamplingConfig
from mmgen.tasks import digits_report, report
from mmgen.tasks.comparison import Comparison, agreement, as_text, compare, side, table
from mmgen.tasks.digits import Digits, digits, told
from mmgen.tasks.digits import table as digits_table
from mmgen.tasks.train import train, with_quantizer
from mmgen.training import log


def demo(
    experiment: Experiment,
    dit: DiTExperiment,
    sampling: SamplingConfig,
    out: Path,
    *,
    device: torch.device,
    resume: bool = True,
) -> tuple[Comparison, Digits]:
    """Leaves a folder per run, results.json and report.html in `out`; runs that are there already are gone on with."""
    runs = {
        quantizer: train(with_quantizer(experiment, quantizer), out / quantizer, device=device, resume=resume)
        for quantizer in ("stock", "fused")
    }
    logs = {quantizer: log.read(run.log_file) for quantizer, run in runs.items()}
    stock, ours = (side(run.model, logs[quantizer], experiment.tokens, device) for quantizer, run in runs.items())
    comparison = compare(stock, ours, logs["stock"], logs["fused"])
    print(f"\n{as_text(table(comparison))}\n\n{agreement(comparison)}\n")

    result, run, samples = digits(dit, sampling, out / "dit", device=device, resume=resume)
    print(f"\n{as_text(digits_table(result))}\n\n{told(result)}")

    (out / "results.json").write_text(json.dumps(asdict(comparison) | {"digits": asdict(result)}, indent=2) + "\n")
    models = {quantizer: run.model for quantizer, run in runs.items()}
    section = digits_report.section(result, dit, sampling, run, samples)
    page = report.page(comparison, experiment, runs["stock"].data, models, logs, device, more=section)
    (out / "report.html").write_text(page)
    print(f"Pictures and curves: {out / 'report.html'}")
    return comparison, result
