"""`python -m mmgen demo`, `train`, `tokenizers`, `train-dit`, `sample`, `train-codes`, `sample-codes` and `codes`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmgen import presets
from mmgen.data import DATASETS, DataConfig
from mmgen.diffusion.codes import ORDERS
from mmgen.diffusion.objective import TARGETS, TIMES
from mmgen.models import VQVAEConfig
from mmgen.models.quantizers import QUANTIZERS
from mmgen.presets import (
    CodeComparison,
    CodeExperiment,
    CodeSamplingConfig,
    DiTExperiment,
    Experiment,
    ImageExperiment,
    SamplingConfig,
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        options.task(options)
    except KeyboardInterrupt:
        kept = f"{options.out} keeps all steps so far, and the same command goes on from there"
        sys.exit(f"\ninterrupted: {kept if 'resume' in options else 'nothing was written'}")
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmgen", description=__doc__)
    tasks = parser.add_subparsers(required=True, metavar="task")

    demo = tasks.add_parser("demo", help="a VQ-VAE with the stock quantizer and with ours, compared; then a DiT of digits")
    demo.set_defaults(task=run_demo)
    demo.add_argument("--dit-steps", type=int, metavar="N", help="training steps of the DiT")
    add_common(demo, out="runs/demo")
    add_sampling(demo)

    train = tasks.add_parser("train", help="train one VQ-VAE, VQGAN or KL autoencoder")
    train.set_defaults(task=run_train)
    train.add_argument("model", nargs="?", choices=list(presets.AUTOENCODERS), default="vqvae", help="default: vqvae")
    add_common(train, out="runs/train")
    add = train.add_argument
    add("--quantizer", choices=list(QUANTIZERS), help="default: fused")
    add("--attention", action=argparse.BooleanOptionalAction, help="at the lowest resolution")
    add("--latent-channels", type=int, metavar="D", help="vae: of its latents")
    add("--kl-weight", type=float, metavar="X", help="vae: of the divergence from a standard normal")
    add_adversary(train)

    tokenizers = tasks.add_parser("tokenizers", help="VQ-VAE, VQGAN and KL autoencoder of the photographs, compared")
    tokenizers.set_defaults(task=run_tokenizers)
    tokenizers.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    for name in ("steps", "batch-size", "image-size"):
        tokenizers.add_argument(f"--{name}", type=int, metavar="N")
    add_adversary(tokenizers)
    add_machine(tokenizers)
    add_folder(tokenizers, out="runs/tokenizers")

    train_dit = tasks.add_parser("train-dit", help="train one DiT on handwritten digits")
    train_dit.set_defaults(task=run_train_dit)
    for name in ("patch-size", "hidden-size", "depth", "num-heads"):
        train_dit.add_argument(f"--{name}", type=int, metavar="N")
    train_dit.add_argument("--target", choices=list(TARGETS), help="what the model predicts; default: flow")
    train_dit.add_argument("--learn-sigma", action=argparse.BooleanOptionalAction, help="with DDPM's targets: the variance, too")
    train_dit.add_argument("--times", choices=TIMES, help="how training times are spread")
    train_dit.add_argument("--ema-decay", type=float, metavar="X")
    add_training(train_dit, out="runs/train-dit")

    sample = tasks.add_parser("sample", help="draw digits from what train-dit has trained, as a picture")
    sample.set_defaults(task=run_sample)
    sample.add_argument("--labels", type=int, nargs="+", metavar="Y", help="classes in turns; default: all")
    sample.add_argument("--seed", type=int, metavar="N")
    add_sampling(sample, "--steps")
    sample.add_argument("--scheduler", metavar="NAME", help="of mk.schedulers; default: Euler's for flows, DDIM's for the others")
    add_machine(sample)
    sample.add_argument("--run", type=Path, default=Path("runs/train-dit"), metavar="DIR", help="default: runs/train-dit")
    sample.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE", help="default: samples.png")
    add_code_tasks(tasks)
    return parser


def add_code_tasks(tasks: Any) -> None:
    train = tasks.add_parser("train-codes", help="train one transformer of a tokenizer's codes")
    train.set_defaults(task=run_train_codes)
    train.add_argument("kind", choices=["causal", "diffusion"])
    train.add_argument("--tokenizer", type=Path, default=Path("runs/train"), metavar="DIR", help="default: runs/train")
    train.add_argument("--num-timesteps", type=int, metavar="N", help="of the diffusion")
    train.add_argument("--replaced", type=float, metavar="X", help="of the diffusion: codes are replaced too, not only hidden")
    add_code_model(train)
    add_training(train, out="runs/train-codes")

    sample = tasks.add_parser("sample-codes", help="draw pictures from what train-codes has trained")
    sample.set_defaults(task=run_sample_codes)
    sample.add_argument("--samples", type=int, metavar="N")
    sample.add_argument("--num-inference-steps", type=int, metavar="N", help="of a diffusion model")
    sample.add_argument("--order", choices=ORDERS, help="in which a diffusion model shows codes; default: chance")
    sample.add_argument("--temperature", type=float, metavar="X")
    sample.add_argument("--top-k", type=int, metavar="K", help="only so many likeliest codes may come")
    sample.add_argument("--seed", type=int, metavar="N")
    add_machine(sample)
    sample.add_argument("--run", type=Path, default=Path("runs/train-codes"), metavar="DIR", help="default: runs/train-codes")
    sample.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE", help="default: samples.png")

    codes = tasks.add_parser("codes", help="a causal and a diffusion transformer of a tokenizer's codes, compared in bits")
    codes.set_defaults(task=run_codes)
    codes.add_argument("--tokenizer-steps", type=int, metavar="N", help="training steps of the tokenizer")
    codes.add_argument("--image-size", type=int, metavar="N", help="side of the training crops")
    codes.add_argument("--codebook-size", type=int, metavar="K")
    codes.add_argument("--replicates", type=int, metavar="N", help="how often a diffusion model's bound is drawn")
    codes.add_argument("--until", type=int, metavar="N", help="compare after N of the --steps that the learning rate falls over")
    codes.add_argument("--replaced", type=float, metavar="X", help="of mask and replace; default: 0.2")
    add_code_model(codes)
    add_training(codes, out="runs/codes")


def add_code_model(parser: argparse.ArgumentParser) -> None:
    for name in ("hidden-size", "depth", "num-heads"):
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--ema-decay", type=float, metavar="X")
    parser.add_argument("--eval-every", type=int, metavar="N", help="steps from one score on held-out pictures to the next")


def add_common(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Options left out keep what the preset of the dataset says."""
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="photographs", help="default: photographs")
    add("--path", metavar="DIR", help="the folder of images that --dataset folder reads")
    add("--image-size", type=int, metavar="N", help="side of the training crops")
    add("--codebook-size", type=int, metavar="K")
    add("--codebook-dim", type=int, metavar="D")
    add("--l2-normalize", action=argparse.BooleanOptionalAction, help="latents and codes on the unit sphere")
    add_training(parser, out=out)


def add_training(parser: argparse.ArgumentParser, *, out: str) -> None:
    add = parser.add_argument
    add("--steps", type=int, metavar="N")
    add("--batch-size", type=int, metavar="N")
    add("--learning-rate", type=float, metavar="X")
    add("--checkpoint-every", type=int, metavar="N", help="steps")
    add("--seed", type=int, metavar="N")
    add_machine(parser)
    add_folder(parser, out=out)


def add_adversary(parser: argparse.ArgumentParser) -> None:
    """Of VQGANs and KL autoencoders."""
    add = parser.add_argument
    add("--perceptual-weight", type=float, metavar="X", help="of the loss of edges")
    add("--disc-weight", type=float, metavar="X", help="of the discriminator, times the adaptive weight; 0: none")
    add("--disc-start", type=int, metavar="N", help="steps without its word")
    add("--disc-warmup", type=int, metavar="N", help="the last of them, in which it learns already")


def add_folder(parser: argparse.ArgumentParser, *, out: str) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), metavar="DIR", help=f"default: {out}")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from what --out holds (default)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's own choice")


def add_sampling(parser: argparse.ArgumentParser, *short: str) -> None:
    """`short`: another name of the number of steps, where that is free."""
    add = parser.add_argument
    add("--samples", type=int, metavar="N", help="how many digits the DiT draws")
    add("--num-inference-steps", *short, type=int, metavar="N")
    add("--guidance-scale", type=float, metavar="X", help="of classifier-free guidance; 1 is none")


def with_options(section: Any, options: dict[str, Any]) -> Any:
    """A section of a preset with the given options written over it."""
    names = {field.name for field in fields(section)}
    return replace(section, **{k: v for k, v in options.items() if k in names and v is not None})


def experiment(options: argparse.Namespace) -> Experiment:
    """The dataset's preset with the given options written over it."""
    return with_all_options(dataset_preset(options), vars(options))


def dataset_preset(options: argparse.Namespace) -> Experiment:
    return presets.folder(options.path) if options.dataset == "folder" else getattr(presets, options.dataset.replace("-", "_"))()


EXPERIMENT = TypeVar("EXPERIMENT", bound=ImageExperiment)


def with_all_options(preset: EXPERIMENT, options: dict[str, Any]) -> EXPERIMENT:
    """A preset with the given options written over its sections; an option of another kind of model is refused."""
    refused = options_of_autoencoders() - options_of(preset)
    for name in sorted(name for name, value in options.items() if value is not None and name in refused):
        raise ValueError(f"--{name.replace('_', '-')} is no option of this model")
    data, model, training = (with_options(part, options) for part in (preset.data, preset.model, preset.training))
    return replace(preset, data=data, model=model, training=training)


def options_of(preset: ImageExperiment) -> set[str]:
    return {field.name for part in (preset.data, preset.model, preset.training) for field in fields(part)}


def options_of_autoencoders() -> set[str]:
    return set().union(*(options_of(kind(presets.photographs())) for kind in presets.AUTOENCODERS.values()))


def dit_experiment(options: dict[str, Any]) -> DiTExperiment:
    preset = presets.digits_dit()
    if options.get("target", "flow") not in (None, "flow") and options.get("times") is None:
        options = options | {"times": "uniform"}
    model, objective, training = (with_options(part, options) for part in (preset.model, preset.objective, preset.training))
    return DiTExperiment(model, objective, training)


def code_experiment(kind: str, data: DataConfig, tokenizer: VQVAEConfig, options: dict[str, Any]) -> CodeExperiment:
    """The preset of a kind with the given options written over it, but for what the tokenizer has settled."""
    preset = presets.codes(kind, data, tokenizer)
    given = {name: value for name, value in options.items() if name not in ("image_size", "codebook_size")}
    parts = {part: with_options(getattr(preset, part), given) for part in ("model", "training")}
    if isinstance(preset, presets.CodeDiffusionExperiment):
        preset = replace(preset, **parts, process=with_options(preset.process, given))
        return presets.with_replaced(preset, given["replaced"]) if given.get("replaced") is not None else preset
    for name in ("num_timesteps", "replaced"):
        if given.get(name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is of the diffusion model, got it with causal")
    return replace(preset, **parts)


def set_up(options: argparse.Namespace) -> torch.device:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def run_demo(options: argparse.Namespace) -> None:
    from mmgen.tasks.demo import demo  # matplotlib comes with it

    dit = dit_experiment({"steps": options.dit_steps, "seed": options.seed})
    sampling = with_options(SamplingConfig(), vars(options))
    demo(experiment(options), dit, sampling, options.out, device=set_up(options), resume=options.resume)


def run_train(options: argparse.Namespace) -> None:
    from mmgen.tasks.reconstructions import train_and_show

    chosen = with_all_options(presets.AUTOENCODERS[options.model](dataset_preset(options)), vars(options))
    train_and_show(chosen, options.out, device=set_up(options), resume=options.resume)


def run_tokenizers(options: argparse.Namespace) -> None:
    from mmgen.tasks.tokenizers import tokenizers  # matplotlib comes with it

    chosen = with_all_options(presets.tokenizers(), vars(options))
    tokenizers(chosen, options.seeds, options.out, device=set_up(options), resume=options.resume)


def run_train_dit(options: argparse.Namespace) -> None:
    from mmgen.tasks.train import train_dit

    train_dit(dit_experiment(vars(options)), options.out, device=set_up(options), resume=options.resume)


def run_sample(options: argparse.Namespace) -> None:
    from mmgen.tasks.digits import sample_run

    sampling = with_options(SamplingConfig(samples=100), vars(options))
    sample_run(options.run, options.labels, sampling, options.out, device=set_up(options), scheduler=options.scheduler)


def run_train_codes(options: argparse.Namespace) -> None:
    from mmgen.tasks.train import read_tokenizer, train_codes

    tokenizer, saved, _ = read_tokenizer(options.tokenizer, "--tokenizer")
    chosen = code_experiment(options.kind, DataConfig(**saved["data"]), tokenizer.config, vars(options))
    train_codes(chosen, options.tokenizer, options.out, device=set_up(options), resume=options.resume)


def run_sample_codes(options: argparse.Namespace) -> None:
    from mmgen.tasks.codes import sample_codes

    sample_codes(options.run, with_options(CodeSamplingConfig(), vars(options)), options.out, device=set_up(options))


def run_codes(options: argparse.Namespace) -> None:
    from mmgen.tasks.codes import codes

    preset, given = presets.unseen_photographs(), vars(options)
    of_tokenizer = {"steps": options.tokenizer_steps, "seed": options.seed}
    tokenizer = Experiment(
        with_options(preset.data, given), with_options(preset.model, given), with_options(preset.training, of_tokenizer)
    )
    of_kinds = given | {"replaced": None}
    kinds = {kind: code_experiment(kind, tokenizer.data, tokenizer.model, of_kinds) for kind in ("causal", "diffusion")}
    kinds["mask_and_replace"] = code_experiment("mask_and_replace", tokenizer.data, tokenizer.model, given)
    comparison = with_options(CodeComparison(tokenizer, **kinds), given)  # type: ignore[arg-type]
    codes(comparison, options.out, device=set_up(options), resume=options.resume)


if __name__ == "__main__":
    main()
