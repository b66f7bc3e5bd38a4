"""Three models of a tokenizer's codes, compared: by what they need for photographs that nobody has seen, and by what they draw."""

import json
import time
from dataclasses import asdict, dataclass, replace
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
from mmgen.evaluation import evaluate
from mmgen.evaluation.codes import Bigram, Bits, bits_per_code, encoded, entropy
from mmgen.models import VQVAE, CodeDiffusion, CodeDiffusionConfig, CodeTransformer, CodeTransformerConfig
from mmgen.presets import CodeComparison, CodeSamplingConfig
from mmgen.tasks.comparison import as_text
from mmgen.tasks.digits import grid
from mmgen.tasks.train import read_tokenizer, train, train_codes
from mmgen.training import CodeDiffusionTrainer, CodeTrainer, checkpoint
from mmgen.training.diffusion import DRAWN, FRESH, TEST

FRESH_CROPS = 64  # of the photographs trained on, to see how far apart known and unknown ones are
TIMED_STEPS = 3
SHOWN = 10  # pictures in a row
FEW_STEPS = 16  # of the diffusion models, besides as many as the other has codes to draw
KINDS = {
    "causal": "causal transformer, exact",
    "diffusion": "diffusion transformer, bound from above",
    "mask_and_replace": "the same, mask and replace, bound from above",
}


@dataclass(frozen=True)
class Side:
    """One model, at the step that did best on the held-out photographs."""

    parameters: int
    best_step: int
    held_out_bits: float  # by which that step was chosen: exact, or a bound from above that was drawn once
    test: Bits  # exact, or a bound from above
    fresh_crops: Bits  # of the photographs that it was trained on
    cpu_seconds_per_step: float
    cpu_seconds_per_picture: float


@dataclass(frozen=True)
class Codes:
    codebook_size: int
    tokens_per_picture: int
    held_out_pictures: int
    test_pictures: int
    test_psnr: float  # of the tokenizer, dB
    steps: int
    trained_tokens: int
    replicates: int
    uniform: float  # bits per code, and below
    test_entropy: float
    unigram: float  # of test photographs
    bigram: float
    fresh_unigram: float  # of fresh crops of the photographs trained on
    fresh_bigram: float
    causal: Side
    diffusion: Side
    mask_and_replace: Side
    device: str
    threads: int
    torch: str


def codes(comparison: CodeComparison, out: Path, *, device: torch.device, resume: bool = True) -> Codes:
    """Leaves a folder per run, results.json, codes.png and report.html in `out`; runs that are there already are gone on with."""
    from mmgen.tasks.codes_report import page  # matplotlib comes with it
    from mmgen.tasks.report import device_name

    tokenizer = train(comparison.tokenizer, out / "tokenizer", device=device, resume=resume)
    if tokenizer.data.test is None:
        raise ValueError(f"the comparison is scored on a test part, which dataset {comparison.tokenizer.data.dataset!r} has not")
    where: dict[str, Any] = {"device": device, "resume": resume, "until": comparison.until}
    runs = {kind: train_codes(getattr(comparison, kind), tokenizer.folder, out / kind, **where) for kind in KINDS}
    if len({run.step for run in runs.values()}) > 1:
        steps = ", ".join(str(run.step) for run in runs.values())
        raise ValueError(f"--out {out} holds runs of {steps} steps: go on to the same step")
    causal, K = runs["causal"], comparison.tokenizer.model.codebook_size
    of_pictures: dict[str, Any] = {"batch_size": causal.config.batch_size, "device": device}
    test = encoded(causal.tokenizer, tokenizer.data.test, **of_pictures)  # (M, T)
    fresh = [causal.train[len(causal.train) + i] for i in range(FRESH_CROPS)]  # type: ignore[arg-type]  # items of no epoch
    known = encoded(causal.tokenizer, fresh, **of_pictures)  # type: ignore[arg-type]
    counted = Bigram(trained_codes(causal), K)
    (unigram, bigram), (fresh_unigram, fresh_bigram) = counted.bits(test.cpu()), counted.bits(known.cpu())
    sides, pictures = {}, {}
    for kind, run in runs.items():
        start = time.process_time()
        pictures[kind] = draw(run, SHOWN, CodeSamplingConfig(num_inference_steps=test.shape[1]))
        seconds_per_picture = (time.process_time() - start) / SHOWN
        sides[kind] = Side(
            parameters=sum(p.numel() for p in run.model.parameters()),
            best_step=run.best_step,
            held_out_bits=run.best_bits,
            test=bits(run, test, comparison.replicates, stream=TEST),
            fresh_crops=bits(run, known, comparison.replicates, stream=FRESH),
            cpu_seconds_per_step=seconds_per_step(run, fresh),
            cpu_seconds_per_picture=seconds_per_picture,
        )
    result = Codes(
        codebook_size=K,
        tokens_per_picture=test.shape[1],
        held_out_pictures=len(causal.held_out),
        test_pictures=len(test),
        test_psnr=evaluate(tokenizer.model, tokenizer.data.test, **of_pictures)["psnr"],
        steps=causal.step,
        trained_tokens=causal.step * causal.config.batch_size * test.shape[1],
        replicates=comparison.replicates,
        uniform=torch.tensor(K).log2().item(),
        test_entropy=entropy(test.cpu(), K),
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
    rows = shown(runs, pictures, test)
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
    """Per code of pictures (M, T), by the best of a run."""
    return bits_per_code(
        lambda part, key: run.nats(run.best, part, key),
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
    """Images (N, C, H, W) in [-1, 1] by the best of a run; `start` (N, t) are codes that are given."""
    process = run.process if isinstance(run, CodeDiffusionTrainer) else None
    if start is None:
        start = torch.empty(samples, 0, dtype=torch.int64, device=run.device)
    return decoded(run.tokenizer, draw_codes(run.best, process, start, sampling))


def draw_codes(model: Any, process: Absorbing | None, start: Tensor, sampling: CodeSamplingConfig) -> Tensor:
    """(N, T), of which the first codes are `start` (N, t), from a CodeDiffusion with its process or a CodeTransformer without."""
    key = mk.fold_in(torch.tensor([sampling.seed, 0], device=start.device), DRAWN)
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


def shown(runs: dict[str, CodeTrainer], drawn: dict[str, Tensor], test: Tensor) -> list[tuple[str, Tensor]]:
    """Rows of pictures (N, C, H, W), each with what it is; `test` (M, T) are codes of test photographs."""
    T = test.shape[1]
    some = test[torch.arange(SHOWN, device=test.device) * len(test) // SHOWN]  # (N, T)
    upper, sampling = some[:, : T // 2], CodeSamplingConfig(num_inference_steps=T)
    # Mask and replace doubts what it is given, too, and would not leave the upper half as it is.
    completed = {kind: draw(runs[kind], SHOWN, sampling, start=upper) for kind in ("causal", "diffusion")}
    few = CodeSamplingConfig(num_inference_steps=FEW_STEPS)
    by_chance = {kind: draw(runs[kind], SHOWN, few) for kind in ("diffusion", "mask_and_replace")}
    surest = draw(runs["diffusion"], SHOWN, replace(few, order="confidence"))
    return [
        ("drawn by the causal transformer, code after code", drawn["causal"]),
        (f"drawn by the diffusion transformer in {T} steps", drawn["diffusion"]),
        (f"drawn by mask and replace in {T} steps", drawn["mask_and_replace"]),
        (f"drawn by the diffusion transformer in {FEW_STEPS} steps", by_chance["diffusion"]),
        (f"drawn by mask and replace in {FEW_STEPS} steps", by_chance["mask_and_replace"]),
        (f"drawn by the diffusion transformer in {FEW_STEPS} steps, the surest codes first", surest),
        ("test photographs, through the tokenizer", decoded(runs["causal"].tokenizer, some)),
        ("their upper halves, completed by the causal transformer", completed["causal"]),
        ("their upper halves, completed by the diffusion transformer", completed["diffusion"]),
    ]


def read_model(last: Path) -> tuple[nn.Module, Absorbing | None, int]:
    """The best average that a checkpoint holds, the process of a diffusion model, and the step that the average is of.

    Before the first score none is the best: then it is the latest one.
    """
    saved = checkpoint.read_config(last)
    model: nn.Module
    process = None
    if "process" in saved:
        kind = MaskAndReplaceConfig if "replaced" in saved["process"] else AbsorbingConfig
        config = CodeDiffusionConfig(**saved["model"])
        model, process = CodeDiffusion(config), process_of(kind(**saved["process"]), config.num_codes)
    else:
        model = CodeTransformer(CodeTransformerConfig(**saved["model"]))
    state = checkpoint.read_state(last)
    best = state["best"]
    weights, step = (best["weights"], best["step"]) if best["step"] else (state["ema"], state["step"])
    model.load_state_dict(weights)
    return model.eval(), process, step


def table(result: Codes) -> list[tuple[str, str, str, str]]:
    """Rows of what, bits per code of test photographs, of fresh crops of known ones, parameters; the first is the heading."""

    def row(kind: str) -> tuple[str, str, str, str]:
        model: Side = getattr(result, kind)
        known, unknown = (
            f"≤ {bits.mean:.3f} ± {bits.standard_error:.3f}" if bits.standard_error else f"{bits.mean:.3f}"
            for bits in (model.fresh_crops, model.test)
        )
        return KINDS[kind], unknown, known, f"{model.parameters:,}"

    pairs = (result.codebook_size + 1) * result.codebook_size
    return [
        ("bits per code", "test photographs", "fresh crops of known ones", "parameters"),
        ("all codes alike", f"{result.uniform:.3f}", "", "0"),
        ("shares of codes in training", f"{result.unigram:.3f}", f"{result.fresh_unigram:.3f}", f"{result.codebook_size:,}"),
        ("entropy of the test codes' own shares", f"{result.test_entropy:.3f}", "", ""),
        ("pairs of codes in training", f"{result.bigram:.3f}", f"{result.fresh_bigram:.3f}", f"{pairs:,}"),
        *(row(kind) for kind in KINDS),
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
    tokenizer, _, _ = read_tokenizer(folder / "tokenizer", "--run")
    model, process, step = read_model(last)
    start = torch.empty(sampling.samples, 0, dtype=torch.int64, device=device)
    drawn = draw_codes(model.to(device), process, start, sampling)
    images = decoded(tokenizer.to(device).eval(), drawn)
    Image.fromarray(to_pixels(grid(list(images.split(10))), enlarged=2)).save(out)
    print(f"{len(images)} pictures of step {step}, the best of {int(last.name.removeprefix('step-'))}: {out}")
