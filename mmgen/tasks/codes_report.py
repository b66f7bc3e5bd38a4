"""The comparison of code models as one HTML file that needs nothing beside it."""

import html
import io

from matplotlib.figure import Figure
from torch import Tensor

from mmgen.presets import CodeComparison
from mmgen.tasks.codes import Codes, table
from mmgen.tasks.digits import grid
from mmgen.tasks.report import STYLE, embedded, picture_tag, table_rows
from mmgen.training import CodeTrainer, log

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>mmgen codes</title>
{style}
<h1>Two models of a tokenizer's codes</h1>
<p>A VQ-VAE turns each {pixels} &times; {pixels} crop of a photograph into {tokens} of {codebook_size} codes. Two transformers of
the same size saw the same {trained_tokens:,} codes of crops of nine photographs: one predicts each code from those before it, the
other predicts hidden ones from those that are seen. Three photographs were shown to none of the three models; they are scored
whole, in {held_out_pictures} tiles, which the tokenizer gives back at {held_out_psnr:.2f} dB.</p>
<table>{table}</table>
<ul>
<li>The causal transformer's figure is its cross-entropy. The diffusion transformer's is a bound from above on what it needs, drawn
{replicates} times for all tiles; &plusmn; is the standard error of the drawing, not of the choice of photographs.</li>
<li>Shares and pairs (each code and the one before it, Witten and Bell) are counted on the codes that the transformers saw.</li>
<li>CPU seconds: a training step forward and backward {causal_step:.2f} (causal) and {diffusion_step:.2f} (diffusion); a picture
{causal_picture:.2f} and, in {tokens} steps, {diffusion_picture:.2f}.</li>
</ul>
<h2>Pictures</h2>
{pictures}
<h2>Curves</h2>
{curves}
<h2>Machine, versions, settings</h2>
<pre>{facts}</pre>
</html>
"""


def page(result: Codes, comparison: CodeComparison, runs: dict[str, CodeTrainer], rows: list[tuple[str, Tensor]]) -> str:
    lines = [f"device   {result.device}", f"threads  {result.threads}", f"torch    {result.torch}"]
    for model, sections in comparison.settings.items():
        if isinstance(sections, dict):
            values = (f"{k}: {', '.join(f'{name} {v}' for name, v in part.items())}" for k, part in sections.items())
            lines += ["", model, *values]
    return PAGE.format(
        style=STYLE,
        pixels=comparison.tokenizer.data.image_size,
        tokens=result.tokens_per_picture,
        codebook_size=result.codebook_size,
        trained_tokens=result.trained_tokens,
        held_out_pictures=result.held_out_pictures,
        held_out_psnr=result.held_out_psnr,
        replicates=result.replicates,
        table=table_rows(table(result)),
        causal_step=result.causal.cpu_seconds_per_step,
        diffusion_step=result.diffusion.cpu_seconds_per_step,
        causal_picture=result.causal.cpu_seconds_per_picture,
        diffusion_picture=result.diffusion.cpu_seconds_per_picture,
        pictures="".join(f"<p>{html.escape(what)}:</p>{picture_tag(grid([row]))}" for what, row in rows),
        curves=curves(result, runs),
        facts=html.escape("\n".join(lines)),
    )


def curves(result: Codes, runs: dict[str, CodeTrainer]) -> str:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, run in runs.items():
        records = log.read(run.log_file)
        (line,) = axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=0.5, alpha=0.5)
        scored = {r["step"]: r["held_out_bits"] for r in records if "held_out_bits" in r}
        axes.plot([*scored], [*scored.values()], "o-", color=line.get_color(), label=f"{kind}, average of the weights, held out")
    for name, bits in (("shares", result.unigram), ("pairs", result.bigram)):
        axes.axhline(bits, linestyle=":", color="grey")
        axes.annotate(name, (0, bits))
    axes.set(title="bits per code (line: a batch)", xlabel="step", ylim=(0, result.uniform + 1))
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return embedded(file)
