"""The comparison of code models as one HTML file that needs nothing beside it."""

import html
import io

from matplotlib.figure import Figure
from torch import Tensor

from mmgen.presets import CodeComparison
from mmgen.tasks.codes import KINDS, Codes, table
from mmgen.tasks.digits import grid
from mmgen.tasks.report import STYLE, embedded, picture_tag, table_rows
from mmgen.training import CodeTrainer, log

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>mmgen codes</title>
{style}
<h1>Three models of a tokenizer's codes</h1>
<p>A VQ-VAE turns each {pixels} &times; {pixels} crop of a photograph into {tokens} of {codebook_size} codes. Three transformers of
the same size saw the same {trained_tokens:,} codes of crops of nine photographs: one predicts each code from those before it, one
predicts hidden codes from those that are seen, and one does so where some that are seen have been replaced by others. Three
photographs more ({held_out_pictures} tiles) are scored while they are trained, and a transformer's best step on those is what is
scored in the end, once, on the three of the test part: whole, in {test_pictures} tiles, which the tokenizer gives back at
{test_psnr:.2f} dB. Nothing was trained on either.</p>
<table>{table}</table>
<ul>
<li>The causal transformer's figure is its cross-entropy. The others' are bounds from above on what they need, drawn {replicates}
times for all tiles; &plusmn; is the standard error of the drawing, not of the choice of photographs.</li>
<li>Shares and pairs (each code and the one before it, Witten and Bell) are counted on the codes that the transformers saw.</li>
<li>Best steps: {best}.</li>
<li>CPU seconds of a training step forward and backward: {step}. Of a picture, by the latter two in {tokens} steps: {picture}.</li>
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
        test_pictures=result.test_pictures,
        test_psnr=result.test_psnr,
        replicates=result.replicates,
        table=table_rows(table(result)),
        best=each(result, "{0.best_step} of " + str(result.steps)),
        step=each(result, "{0.cpu_seconds_per_step:.2f}"),
        picture=each(result, "{0.cpu_seconds_per_picture:.2f}"),
        pictures="".join(f"<p>{html.escape(what)}:</p>{picture_tag(grid([row]))}" for what, row in rows),
        curves=curves(result, runs),
        facts=html.escape("\n".join(lines)),
    )


def each(result: Codes, what: str) -> str:
    """`what` of each model, in words."""
    return ", ".join(f"{what.format(getattr(result, kind))} ({kind.replace('_', ' ')})" for kind in KINDS)


def curves(result: Codes, runs: dict[str, CodeTrainer]) -> str:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, run in runs.items():
        records = log.read(run.log_file)
        (line,) = axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=0.5, alpha=0.5)
        scored = {r["step"]: r["held_out_bits"] for r in records if "held_out_bits" in r}
        name = kind.replace("_", " ")
        axes.plot([*scored], [*scored.values()], ".-", color=line.get_color(), label=f"{name}, average of the weights, held out")
        axes.plot(run.best_step, run.best_bits, "o", color=line.get_color())
    title = "bits per code (thin: of a batch; dot: of held-out photographs; large dot: the step that is scored)"
    axes.set(title=title, xlabel="step", ylim=(0, result.uniform + 1))
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return embedded(file)
