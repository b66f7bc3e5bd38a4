"""The comparison of tokenizers as one HTML file that needs nothing beside it."""

import html
import io
import json
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from mmgen.tasks.report import STYLE, embedded, picture_tag, table_rows
from mmgen.training import AutoencoderTrainer, log

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>mmgen tokenizers</title>
{style}
<h1>Tokenizers of photographs</h1>
<table>{table}</table>
<p>Held-out crops of seed {seed}. From above: original, {shown}.</p>
{picture}
{curves}
<pre>{facts}</pre>
</html>
"""

CURVES = {
    "held_out_detail": "detail of held-out reconstructions",
    "held_out_psnr": "PSNR of held-out reconstructions, dB",
    "adaptive_weight": "adaptive weight",
    "disc_loss": "discriminator's loss",
}


def page(
    result: dict[str, Any],
    table: Sequence[tuple[str, ...]],
    seed: int,
    shown: Sequence[str],
    picture: Tensor,
    runs: dict[str, AutoencoderTrainer],
) -> str:
    """Of the picture's rows below the originals, `shown` are the names; `runs` are those of `seed`."""
    return PAGE.format(
        style=STYLE,
        table=table_rows(table),
        seed=seed,
        shown=", ".join(shown),
        picture=picture_tag(picture),
        curves=curves(runs),
        facts=html.escape(json.dumps({"stamp": result["stamp"], "settings": result["settings"]}, indent=1)),
    )


def curves(runs: dict[str, AutoencoderTrainer]) -> str:
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for name, run in runs.items():
            points = {r["step"]: r[key] for r in log.read(run.log_file) if key in r}
            if any(points.values()):
                axes.plot([*points], [*points.values()], label=name, linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return embedded(file)
