"""The demo's result as one HTML file that needs nothing beside it."""

import base64
import html
import io
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import mmgen_kernels as mk
from mmgen.data import Data
from mmgen.data.crops import to_pixels
from mmgen.evaluation import reconstruct
from mmgen.evaluation.memory import HOW
from mmgen.models import VQVAE
from mmgen.presets import Experiment
from mmgen.tasks.comparison import Comparison, Log, agreement, table

CROPS_SHOWN = 12
NAMES = {"stock": "stock", "fused": "ours"}
CURVES = {
    "loss": "loss",
    "psnr": "PSNR, dB (line: training batch, dots: held out)",
    "window_usage": "codebook usage over a window",
    "quantizer_ms": "quantizer, ms (forward + backward)",
}

STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; }
th, td { padding: .3rem 1rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { width: 100%; margin-bottom: 1rem; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: 13px; }
</style>"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>mmgen demo</title>
{style}
<h1>One VQ-VAE, two quantizers</h1>
<p>The same model was trained twice on {dataset}, from the same seed on the same batches: {tokens} tokens a step,
{codebook_size} codes of dimension {codebook_dim}. Only the quantizer differs: <b>stock</b> is what training scripts do
(the whole N &times; K distance matrix, argmin, lookup), <b>ours</b> is one fused operator.</p>
<table>{table}</table>
<p>{agreement}</p>
<h2>Pictures</h2>
<p>Held-out crops. From above: original, stock, ours.</p>
{crops}
{gallery}
<h2>Curves</h2>
{curves}
<h2>How it was measured</h2>
<ul>
<li>Steps per second: the mean over all steps, data loading included, evaluation and checkpoints left out.</li>
<li>Quantizer: the median over the steps of its forward plus backward, by clocks at its input and output inside the
training step; normalisation of latents and codebook included.</li>
<li>Peak memory of one quantizer step, forward and backward: {memory}.</li>
<li>Held-out scores: over all pixels and tokens of the held-out set. Training usage and perplexity: over the last
{window} steps. Both grow with the tokens counted.</li>
</ul>
{more}
<h2>Machine, versions, settings</h2>
<pre>{facts}</pre>
</html>
"""


def page(
    comparison: Comparison,
    experiment: Experiment,
    data: Data,
    models: dict[str, VQVAE],
    logs: dict[str, Log],
    device: torch.device,
    *,
    more: str = "",
) -> str:
    """`more`: HTML of another stage."""
    count = len(data.held_out)
    crops = [data.held_out[i * count // CROPS_SHOWN] for i in range(CROPS_SHOWN)]
    whole = [picture_tag(torch.cat(versions(picture, models), dim=2)) for picture in data.gallery]
    return PAGE.format(
        style=STYLE,
        dataset=experiment.data.dataset,
        tokens=experiment.tokens,
        codebook_size=experiment.model.codebook_size,
        codebook_dim=experiment.model.codebook_dim,
        table=table_rows(table(comparison)),
        agreement=agreement(comparison),
        crops=picture_tag(torch.cat([torch.cat(versions(crop, models), dim=1) for crop in crops], dim=2)),
        gallery=f"<p>{data.gallery_note} From the left: original, stock, ours.</p>{''.join(whole)}" if whole else "",
        curves=curves_tag(logs),
        memory=HOW[device.type],
        window=experiment.training.codebook_window,
        more=more,
        facts=html.escape(facts(experiment, device)),
    )


def table_rows(rows: Sequence[tuple[str, ...]]) -> str:
    heading, *others = rows
    return "".join([table_row("th", heading), *(table_row("td", row) for row in others)])


def table_row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def versions(picture: Tensor, models: dict[str, VQVAE]) -> list[Tensor]:
    """The original, cropped to whole tokens, and what each model makes of it; each (C, H, W)."""
    reconstructions = [reconstruct(model, picture) for model in models.values()]
    height, width = reconstructions[0].shape[1:]
    return [picture[:, :height, :width], *reconstructions]


def picture_tag(picture: Tensor, enlarged: int = 2) -> str:
    """(C, H, W) in [-1, 1] as an image of the page, enlarged so that browsers do not blur it."""
    file = io.BytesIO()
    Image.fromarray(to_pixels(picture, enlarged)).save(file, format="png")
    return embedded(file)


def curves_tag(logs: dict[str, Log]) -> str:
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for quantizer, log in logs.items():
            (line,) = axes.plot([r["step"] for r in log], [r[key] for r in log], label=NAMES[quantizer], linewidth=1)
            if key == "psnr":
                scored = {r["step"]: r["held_out_psnr"] for r in log if "held_out_psnr" in r}
                axes.plot(scored.keys(), scored.values(), "o", color=line.get_color())
        axes.set(title=title, xlabel="step", yscale="log" if key in ("loss", "quantizer_ms") else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return embedded(file)


def embedded(png: io.BytesIO) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def facts(experiment: Experiment, device: torch.device) -> str:
    lines = [
        f"device          {device_name(device)}",
        f"threads         {torch.get_num_threads()}",
        f"python          {platform.python_version()}",
        f"torch           {torch.__version__}",
        f"mmgen_kernels   {mk.__version__}",
    ]
    for section, values in experiment.settings.items():
        lines.append(f"{section:<16}{', '.join(f'{k} {v}' for k, v in values.items() if k != 'quantizer')}")
    return "\n".join([*lines, "", mk.backend_report()])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
