"""The digits' part of the demo's page."""

import html
import io

from matplotlib.figure import Figure
from torch import Tensor

from mmgen.presets import DiTExperiment, SamplingConfig
from mmgen.tasks.digits import ROUNDS, STEPS_OF_A_ROUND, Digits, grid, table, told
from mmgen.tasks.report import embedded, picture_tag, table_rows
from mmgen.training import DiTTrainer, log

COLUMNS = 14  # samples shown of a class

SECTION = """<h1>A Diffusion Transformer of digits</h1>
<p>Trained on {trained_on} handwritten digits of 8 &times; 8 pixels, {steps} steps of {batch_size}; {samples} samples were drawn
from the average of its weights with {num_inference_steps} steps of {scheduler}, guided by {guidance_scale}.</p>
<table>{table}</table>
<p>{told}</p>
<p>Samples, a class in each row:</p>
{pictures}
<p>Held-out digits, which people wrote:</p>
{real}
{curve}
<ul>
<li>The classifier is trained on the {held_out} held-out digits, which the transformer has not seen; under "real digits" it reads
the training digits. Distances of real digits are those of the held-out ones. Pixels are in [-1, 1].</li>
<li>Steps per second: a fresh model takes the same steps with kernels and with <code>mk.use_backend("reference")</code>, plain
PyTorch, in turns of {steps_of_a_round}; medians of {rounds} rounds, data loading left out.</li>
</ul>
<pre>{settings}</pre>
"""


def section(result: Digits, experiment: DiTExperiment, sampling: SamplingConfig, run: DiTTrainer, samples: Tensor) -> str:
    """HTML; samples (N, C, S, S) class after class in turns."""
    classes = experiment.model.num_classes
    real, labels = run.data.held_out.tensors()
    by_class = [real[labels == label] for label in range(classes)]
    shown = min(COLUMNS, *(len(images) for images in by_class))
    settings = [f"{name:<16}{', '.join(f'{k} {v}' for k, v in values.items())}" for name, values in experiment.settings.items()]
    return SECTION.format(
        trained_on=len(run.data.train),
        held_out=len(run.data.held_out),
        steps=experiment.training.steps,
        batch_size=experiment.training.batch_size,
        samples=len(samples),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        scheduler=experiment.objective.scheduler[0],
        table=table_rows(table(result)),
        told=told(result),
        pictures=picture_tag(grid([samples[label::classes][:COLUMNS] for label in range(classes)]), enlarged=6),
        real=picture_tag(grid([images[:shown] for images in by_class]), enlarged=6),
        curve=curve(run),
        steps_of_a_round=STEPS_OF_A_ROUND,
        rounds=ROUNDS,
        settings=html.escape("\n".join(settings)),
    )


def curve(run: DiTTrainer) -> str:
    records = log.read(run.log_file)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=0.5, label="a batch")
    scored = {r["step"]: r["held_out_loss"] for r in records if "held_out_loss" in r}
    axes.plot([*scored], [*scored.values()], "o-", label="average of the weights, held out")
    axes.set(title="loss", xlabel="step", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return embedded(file)
