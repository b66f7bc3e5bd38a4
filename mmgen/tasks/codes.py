"""Two models of a tokenizer's codes, compared: by what they need for photographs that nobody has seen, and by what they draw."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen.data import StepSampler
from mmgen.data.crops import RandomCrops, to_pixels
from mmgen.diffusion.codes import Absorbing, AbsorbingConfig
from mmgen.diffusion.mask_and_replace import MaskAndReplaceConfig, process_of
from mmgen.evaluation.codes import Bigram, Bits, bits_per_code, encoded, entropy
from mmgen.models import VQVAE, CodeDiffusion, CodeDiffusionConfig, CodeTransformer, CodeTransformerConfig
from mmgen.presets import CodeComparison, CodeSamplingConfig
from mmgen.tasks.comparison import as_text
from mmgen.tasks.digits import grid
from mmgen.tasks.train import read_tokenizer, train, train_codes
from mmgen.training import CodeDiffusionTrainer, CodeTrainer, checkpoint, log

FRESH_CROPS = 64  # of the photographs trained on, to see how far apart known and unknown ones are
TIMED_STEPS = 3
SHOWN = 10  # pictures in a row
FEW_STEPS = 16  # of the diffusion model, besides as many as the other has codes to draw


@dataclass(frozen=True)
class Side:
    """One model."""

    parameters: int
    held_out: Bits  # exact, or a bound from above
    fresh_crops: Bits  # of the photographs that it was trained on
    cpu_seconds_per_step: float
    cpu_seconds_per_picture: float


@dataclass(frozen=True)
class Codes:
    codebook_size: int
    tokens_per_picture: int
    held_out_pictures: int
    held_out_psnr: float  # of the tokenizer, dB
    steps: int
    trained_tokens: int
    replicates: int
    uniform: float  # bits per code, and below
    held_out_entropy: float
    unigram: float  # of held-out photographs
    bigram: float
    fresh_unigram: float  # of fresh crops of the photographs trained on
    fresh_bigram: float
    causal: Side
    diffusion: Side
    device: str
    threads: int
    torch: str


def codes(comparison: CodeComparison, out: Path, *, device: torch.device, resume: bool = True) -> Codes:
    """Leaves a folder per run, results.json, codes.png and report.html in `out`; runs that are there already are gone on with."""
    from mmgen.tasks.codes_report import page  # matplotlib comes with it
    from mmgen.tasks.report import device_name

    tokenizer = train(comparison.tokenizer, out / "tokenizer", device=device, resume=resume)
    runs = {
        kind: train_codes(experiment, tokenizer.folder, out / kind, device=device, resume=resume, until=comparison.until)
        for kind, experiment in (("causal", comparison.causal), ("diffusion", comparison.diffusion))
    }
    causal, held_out = runs["causal"], runs["causal"].held_out  # (M, T)
    if len({run.step for run in runs.values()}) > 1:
        raise ValueError(f"--out {out} holds runs of {causal.step} and {runs['diffusion'].step} steps: go on to the same step")
    K = comparison.tokenizer.model.codebook_size
    fresh = [causal.train[len(causal.train) + i] for i in range(FRESH_CROPS)]  # type: ignore[arg-type]  # items of no epoch
    known = encoded(causal.tokenizer, fresh, batch_size=causal.config.batch_size, device=device)  # type: ignore[arg-type]
    counted = Bigram(trained_codes(causal), K)
    (unigram, bigram), (fresh_unigram, fresh_bigram) = counted.bits(held_out.cpu()), counted.bits(known.cpu())
    sides, pictures = {}, {}
    for kind, run in runs.items():
        start = time.process_time()
        pictures[kind] = draw(run, SHOWN, CodeSamplingConfig(num_inference_steps=held_out.shape[1]))
        seconds_per_picture = (time.process_time() - start) / SHOWN
        sides[kind] = Side(
            parameters=sum(p.numel() for p in run.model.parameters()),
            held_out=bits(run, held_out, comparison.replicates, stream=2),
            fresh_crops=bits(run, known, comparison.replicates, stream=3),
            cpu_seconds_per_step=seconds_per_step(run, fresh),
            cpu_seconds_per_picture=seconds_per_picture,
        )
    result = Codes(
        codebook_size=K,
        tokens_per_picture=held_out.shape[1],
        held_out_pictures=len(held_out),
        held_out_psnr=log.read(tokenizer.log_file)[-1]["held_out_psnr"],
        steps=causal.step,
        trained_tokens=causal.step * causal.config.batch_size * held_out.shape[1],
        replicates=comparison.replicates,
        uniform=torch.tensor(K).log2().item(),
        held_out_entropy=entropy(held_out.cpu(), K),
        unigram=unigram,
        bigram=bigram,
        fresh_unigram=fresh_unigram,
        fresh_bigram=fresh_bigram,
        **sides,
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    print(f"\n{as_text(table(result))}\n")
    (out / "results.json").write_text(json.dumps(asdict(result) | {"settings": comparison.settings}, indent=2) + "\n")
    few = CodeSamplingConfig(num_inference_steps=FEW_STEPS, order="confidence")
    pictures["few steps"] = draw(runs["diffusion"], SHOWN, few)
    rows = shown(runs, pictures)
    Image.fromarray(to_pixels(grid([row for _, row in rows]), enlarged=2)).save(out / "codes.png")
    (out / "report.html").write_text(page(result, comparison, runs, rows))
    print(f"Pictures and curves: {out / 'report.html'}")
    return result


def trained_codes(run: CodeTrainer) -> Tensor:
    """All that the run was trained on so far, (step B, T)."""
    crops: RandomCrops = run.train  # type: ignore[assignment]
    batches = StepSampler(len(crops), run.config.batch_size, seed=run.config.seed, stop=run.step)
    with torch.no_grad():
        parts = (torch.stack([crops[i] for i in batch]).to(run.device) for batch in batches)
        return torch.cat([run.tokenizer.encode(part).indices.flatten(1).cpu() for part in parts])


def bits(run: CodeTrainer, pictures: Tensor, replicates: int, *, stream: int) -> Bits:
    """Per code of pictures (M, T), by the average of a run."""
    return bits_per_code(
        lambda part, key: run.nats(run.ema, part, key),
        pictures,
        key=mk.fold_in(run.key, stream),
        batch_size=4 * run.config.batch_size,
        replicates=replicates if isinstance(run, CodeDiffusionTrainer) else 1,
    )


def seconds_per_step(run: CodeTrainer, images: list[Tensor]) -> float:
    """CPU time of a forward and a backward on a training batch, encoding included; the model stays as it is."""
    batch = torch.stack(images[: run.config.batch_size]).to(run.device)
    for turn in range(1 + TIMED_STEPS):  # the first warms up
        if turn == 1:
            start = time.process_time()
        with torch.no_grad():
            pictures = run.tokenizer.encode(batch).indices.flatten(1)
        run.nats(run.model, pictures, run.key).sum().backward()
    run.optimizer.zero_grad()
    return (time.process_time() - start) / TIMED_STEPS


def draw(run: CodeTrainer, samples: int, sampling: CodeSamplingConfig, start: Tensor | None = None) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] by the average of a run; `start` (N, t) are codes that are given."""
    process = run.process if isinstance(run, CodeDiffusionTrainer) else None
    if start is None:
        start = torch.empty(samples, 0, dtype=torch.int64, device=run.device)
    return decoded(run.tokenizer, draw_codes(run.ema, process, start, sampling))


def draw_codes(model: Any, process: Absorbing | None, start: Tensor, sampling: CodeSamplingConfig) -> Tensor:
    """(N, T), of which the first codes are `start` (N, t), from a CodeDiffusion with its process or a CodeTransformer without."""
    key = torch.tensor([sampling.seed, 0], device=start.device)
    keys = mk.fold_in(key, torch.arange(len(start), device=start.device))  # (N, 2)
    if process is None:
        return model.sample(keys, start=start, temperature=sampling.temperature, top_k=sampling.top_k)
    whole = F.pad(start, (0, model.config.num_tokens - start.shape[1]), value=model.config.num_codes)  # (N, T)
    options: dict[str, Any] = {"order": sampling.order, "temperature": sampling.temperature, "top_k": sampling.top_k}
    return process.sample(model, whole, sampling.num_inference_steps, key=keys, **options)


@torch.no_grad()
def decoded(tokenizer: VQVAE, pictures: Tensor) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], on the CPU, of square pictures of codes (N, T)."""
    side = round(pictures.shape[1] ** 0.5)
    return tokenizer.decode_code(pictures.unflatten(1, (side, side))).clamp(-1, 1).cpu()


def shown(runs: dict[str, CodeTrainer], drawn: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Rows of pictures (N, C, H, W), each with what it is."""
    run = runs["causal"]
    T = run.held_out.shape[1]
    some = run.held_out[torch.arange(SHOWN, device=run.device) * len(run.held_out) // SHOWN]  # (N, T)
    upper, sampling = some[:, : T // 2], CodeSamplingConfig(num_inference_steps=T)
    completed = {kind: draw(runs[kind], SHOWN, sampling, start=upper) for kind in runs}
    return [
        ("drawn by the causal transformer, code after code", drawn["causal"]),
        (f"drawn by the diffusion transformer in {T} steps", drawn["diffusion"]),
        (f"drawn by the diffusion transformer in {FEW_STEPS} steps, the surest codes first", drawn["few steps"]),
        ("held-out photographs, through the tokenizer", decoded(run.tokenizer, some)),
        ("their upper halves, completed by the causal transformer", completed["causal"]),
        ("their upper halves, completed by the diffusion transformer", completed["diffusion"]),
    ]


def read_model(last: Path) -> tuple[nn.Module, Absorbing | None]:
    """The average that a checkpoint holds, and the process of a diffusion model."""
    saved = checkpoint.read_config(last)
    model: nn.Module
    process = None
    if "process" in saved:
        kind = MaskAndReplaceConfig if "replaced" in saved["process"] else AbsorbingConfig
        config = CodeDiffusionConfig(**saved["model"])
        model, process = CodeDiffusion(config), process_of(kind(**saved["process"]), config.num_codes)
    else:
        model = CodeTransformer(CodeTransformerConfig(**saved["model"]))
    model.load_state_dict(checkpoint.read_state(last)["ema"])
    return model.eval(), process


def table(result: Codes) -> list[tuple[str, str, str, str]]:
    """Rows of what, bits per code of held-out photographs, of fresh crops of known ones, parameters; the first is the heading."""

    def row(name: str, model: Side, sign: str = "") -> tuple[str, str, str, str]:
        known, unknown = (
            f"{sign}{bits.mean:.3f}" + (f" ± {bits.standard_error:.3f}" if bits.standard_error else "")
            for bits in (model.fresh_crops, model.held_out)
        )
        return name, unknown, known, f"{model.parameters:,}"

    pairs = (result.codebook_size + 1) * result.codebook_size
    return [
        ("bits per code", "held-out photographs", "fresh crops of known ones", "parameters"),
        ("all codes alike", f"{result.uniform:.3f}", "", "0"),
        ("shares of codes in training", f"{result.unigram:.3f}", f"{result.fresh_unigram:.3f}", f"{result.codebook_size:,}"),
        ("entropy of the held-out codes' own shares", f"{result.held_out_entropy:.3f}", "", ""),
        ("pairs of codes in training", f"{result.bigram:.3f}", f"{result.fresh_bigram:.3f}", f"{pairs:,}"),
        row("causal transformer, exact", result.causal),
        row("diffusion transformer, bound from above", result.diffusion, "≤ "),
    ]


def sample_codes(folder: Path, sampling: CodeSamplingConfig, out: Path, *, device: torch.device) -> None:
    """Draws from the last checkpoint of a run, ten in a row, and writes one picture."""
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        raise FileNotFoundError(f"--run must be a folder that train-codes has written to, got {str(folder)!r}")
    saved = checkpoint.read_config(last)
    if "num_codes" not in saved["model"]:
        raise ValueError(f"--run must hold a model of codes, got {str(folder)!r}, which holds another model")
    if sampling.top_k is not None and not 1 <= sampling.top_k <= saved["model"]["num_codes"]:
        raise ValueError(f"--top-k must be between 1 and {saved['model']['num_codes']}, the codes, got {sampling.top_k}")
    tokenizer, _ = read_tokenizer(folder / "tokenizer", "--run")
    model, process = read_model(last)
    start = torch.empty(sampling.samples, 0, dtype=torch.int64, device=device)
    drawn = draw_codes(model.to(device), process, start, sampling)
    images = decoded(tokenizer.to(device).eval(), drawn)
    Image.fromarray(to_pixels(grid(list(images.split(10))), enlarged=2)).save(out)
    print(f"{len(images)} pictures of step {int(last.name.removeprefix('step-'))}: {out}")
