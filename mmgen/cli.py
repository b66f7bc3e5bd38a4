"""`python -m mmgen demo` and `python -m mmgen train`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from mmgen import presets
from mmgen.data import DATASETS
from mmgen.models.quantizers import QUANTIZERS
from mmgen.presets import Experiment


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        options.task(options)
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: {options.out} keeps all steps so far, and the same command goes on from there")
    except (ValueError, FileNotFoundError, ModuleNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmgen", description=__doc__)
    tasks = parser.add_subparsers(required=True, metavar="task")

    demo = tasks.add_parser("demo", help="train a VQ-VAE twice, with the stock quantizer and with ours, and compare")
    demo.set_defaults(task=run_demo)
    add_common(demo, out="runs/demo")

    train = tasks.add_parser("train", help="train one VQ-VAE")
    train.set_defaults(task=run_train)
    train.add_argument("--quantizer", choices=list(QUANTIZERS), help="default: fused")
    add_common(train, out="runs/train")
    return parser


def add_common(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Options left out keep what the preset of the dataset says."""
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="photographs", help="default: photographs")
    add("--path", metavar="DIR", help="the folder of images that --dataset folder reads")
    add("--image-size", type=int, metavar="N", help="side of the training crops")
    add("--steps", type=int, metavar="N")
    add("--batch-size", type=int, metavar="N")
    add("--learning-rate", type=float, metavar="X")
    add("--checkpoint-every", type=int, metavar="N", help="steps")
    add("--codebook-size", type=int, metavar="K")
    add("--codebook-dim", type=int, metavar="D")
    add("--l2-normalize", action=argparse.BooleanOptionalAction, help="latents and codes on the unit sphere")
    add("--seed", type=int, metavar="N")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's own choice")
    add("--out", type=Path, default=Path(out), metavar="DIR", help=f"default: {out}")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from what --out holds (default)")


def experiment(options: argparse.Namespace) -> Experiment:
    """The dataset's preset with the given options written over it."""
    preset = presets.folder(options.path) if options.dataset == "folder" else getattr(presets, options.dataset)()

    def with_options(section):
        names = {field.name for field in fields(section)}
        return replace(section, **{k: v for k, v in vars(options).items() if k in names and v is not None})

    return Experiment(with_options(preset.data), with_options(preset.model), with_options(preset.training))


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

    demo(experiment(options), options.out, device=set_up(options), resume=options.resume)


def run_train(options: argparse.Namespace) -> None:
    from mmgen.tasks.train import train

    train(experiment(options), options.out, device=set_up(options), resume=options.resume)


if __name__ == "__main__":
    main()
