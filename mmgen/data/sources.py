"""The datasets by name, each with a part that is trained on and a part that never is. Nothing is ever downloaded.

What is held out may be looked at while a model is trained, and chosen by. Where there is a test part besides, it is for the last
figure of all, and nothing is chosen by it.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmgen.data.crops import Images, MiddleCrops, Pictures, RandomCrops, Tiles, to_float

# One of the stereo pair only: the right view shows what is held out of the left one.
PHOTOGRAPHS = {
    "skimage": (
        "data",
        "astronaut.png camera.png chelsea.png coffee.png coins.png hubble_deep_field.jpg moon.png motorcycle_left.png "
        "retina.jpg rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
PHOTOGRAPH_SIDE = 4  # short side of a photograph in crops: a crop shows a face or a wheel rather than a texture
GROUND = {"skimage": ("data", "brick.png grass.png gravel.png")}  # photographs too, trained on where six others are not
PARTS = 4  # of every four photographs the third is of the test part and the last is held out
FOLDER_SIDE = 2
UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF")  # formats whose names Pillow knows, and no more
HELD_OUT_SHARE = 10  # of a folder, every tenth picture
LABELLED_HELD_OUT = 3
DIGITS_TRAINED_ON = 1437  # the first four fifths: the last digits are of other writers


@dataclass(frozen=True)
class DataConfig:
    dataset: str = "photographs"
    path: str | None = None
    image_size: int = 64

    def __post_init__(self):
        if self.dataset not in DATASETS:
            raise ValueError(f"--dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}")
        if (self.path is None) == (self.dataset == "folder"):
            raise ValueError(
                "--dataset folder needs --path DIR, a folder of images"
                if self.path is None
                else f"--path is read by --dataset folder only, got --dataset {self.dataset} --path {self.path}"
            )
        if self.image_size < 1:
            raise ValueError(f"--image-size must be at least 1, got {self.image_size}")


@dataclass(frozen=True)
class Data:
    """What a tokenizer is trained on, chosen by and scored by; no pixel is in two parts."""

    train: Images
    held_out: Images
    gallery: list[Tensor]  # whole pictures to look at, (3, H, W) in [-1, 1]
    gallery_note: str = ""
    test: Images | None = None  # of the last figure only; most datasets have none


def load(config: DataConfig, seed: int) -> Data:
    return DATASETS[config.dataset](config, seed)


def photographs(config: DataConfig, seed: int) -> Data:
    """The photographs inside scikit-image's and scikit-learn's wheels; the middle columns of each are held out."""
    pictures = Pictures(photograph_paths(), short_side=PHOTOGRAPH_SIDE * config.image_size)
    return Data(
        train=RandomCrops(pictures, config.image_size, seed=seed, hold_out_middle=True),
        held_out=MiddleCrops(pictures, config.image_size, rows=PHOTOGRAPH_SIDE),
        gallery=[to_float(pictures[i]) for i in (0, 2)],
        gallery_note=f"Whole photographs, of which only the middle {config.image_size} columns were held out.",
    )


def unseen_photographs(config: DataConfig, seed: int) -> Data:
    """The same photographs in three parts, each of whole ones, and three of the ground to train on besides.

    Held out are coffee, the left motorcycle and the flower; the test part is the cat, the moon and the roofs in China.
    """
    paths, side = photograph_paths(), PHOTOGRAPH_SIDE * config.image_size
    test, held_out = (Pictures(paths[PARTS - i :: PARTS], side) for i in (2, 1))
    trained_on = [path for i, path in enumerate(paths) if i % PARTS < PARTS - 2] + photograph_paths(GROUND)
    return Data(
        train=RandomCrops(Pictures(trained_on, side), config.image_size, seed=seed),
        held_out=Tiles(held_out, config.image_size),
        gallery=[to_float(held_out[i]) for i in range(len(held_out))],
        gallery_note="Whole held-out photographs.",
        test=Tiles(test, config.image_size),
    )


def photograph_paths(photographs: dict[str, tuple[str, str]] = PHOTOGRAPHS) -> list[Path]:
    paths = []
    for package, (folder, names) in photographs.items():
        spec = find_spec(package)  # the package itself is not imported: skimage.data would set up its downloader
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"--dataset photographs needs {package}: pip install mmgen-kernels[mmgen]")
        paths += [Path(spec.origin).parent / folder / name for name in names.split()]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"--dataset photographs: the installed packages do not hold {', '.join(missing)}")
    return paths


def folder(config: DataConfig, seed: int) -> Data:
    """Any images that Pillow reads, in --path and the folders below it; every tenth is held out."""
    root = Path(config.path or "")
    if not root.is_dir():
        raise FileNotFoundError(f"--path must be a folder of images, got {str(root)!r}, which is no folder")
    suffixes = {suffix for suffix, format in Image.registered_extensions().items() if format not in UNREADABLE}
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if len(paths) < 2:
        raise ValueError(f"--path must hold at least 2 images (one is held out), got {str(root)!r} with {len(paths)}")
    held_out = Pictures(paths[::HELD_OUT_SHARE], short_side=FOLDER_SIDE * config.image_size)
    trained_on = [path for i, path in enumerate(paths) if i % HELD_OUT_SHARE]
    return Data(
        train=RandomCrops(Pictures(trained_on, held_out.short_side), config.image_size, seed=seed),
        held_out=MiddleCrops(held_out, config.image_size, rows=1),
        gallery=[to_float(held_out[0])],
        gallery_note="A whole held-out picture.",
    )


class Digits(Images):
    """scikit-learn's 8x8 handwritten digits, enlarged; one channel."""

    def __init__(self, images: np.ndarray, image_size: int):
        pixels = torch.from_numpy(images).float()[:, None] / 8 - 1  # (N, 1, 8, 8), from 0..16
        size = (image_size, image_size)
        self.images = F.interpolate(pixels, size, mode="bilinear")  # (N, 1, image_size, image_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images with their classes."""

    def __init__(self, images: Images, labels: np.ndarray):
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], self.labels[i]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All at once: (N, C, H, W) and int64 (N,)."""
        return torch.stack([self.images[i] for i in range(len(self))]), torch.tensor(self.labels)


@dataclass(frozen=True)
class LabelledData:
    """What a class-conditional model is trained on and scored by."""

    train: Labelled
    held_out: Labelled
    num_classes: int


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) from 0 to 16, and their classes (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--dataset digits needs sklearn: pip install mmgen-kernels[mmgen]") from error
    bunch = load_digits()
    return bunch.images, bunch.target


def labelled_digits(image_size: int = 8) -> LabelledData:
    """Digits with their classes, as they are or enlarged.

    Every third is held out, so that the same people wrote both parts: what is held out is what samples should be like.
    """
    images, labels = read_digits()
    held_out = np.arange(len(images)) % LABELLED_HELD_OUT == LABELLED_HELD_OUT - 1  # (1797,)
    train, rest = (Labelled(Digits(images[part], image_size), labels[part]) for part in (~held_out, held_out))
    return LabelledData(train, rest, num_classes=10)


def digits(config: DataConfig, seed: int) -> Data:
    """The order is the sampler's; the seed changes nothing here."""
    images, _ = read_digits()
    return Data(
        train=Digits(images[:DIGITS_TRAINED_ON], config.image_size),
        held_out=Digits(images[DIGITS_TRAINED_ON:], config.image_size),
        gallery=[],
    )


DATASETS = {"photographs": photographs, "unseen-photographs": unseen_photographs, "digits": digits, "folder": folder}
