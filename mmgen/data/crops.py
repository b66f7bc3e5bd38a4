"""Square crops out of image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from mmgen.data.sampler import CROPS, generator


@lru_cache(maxsize=512)
def read_picture(path: Path, short_side: int) -> Tensor:
    """uint8 (3, H, W), scaled so that the short side is `short_side`."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"{path} is not an image that Pillow can read: {error}") from error
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Pictures:
    """RGB pictures of one short side; each is decoded when it is asked for."""

    paths: Sequence[Path]
    short_side: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return read_picture(self.paths[i], self.short_side)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(picture: Tensor, enlarged: int = 1) -> np.ndarray:
    """float (1 or 3, H, W) in [-1, 1] -> uint8 (H, W, 3), each pixel `enlarged` times as high and wide."""
    pixels = ((picture + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0)  # (H, W, 3)
    return pixels.repeat_interleave(enlarged, dim=0).repeat_interleave(enlarged, dim=1).numpy()


def middle(width: int, crop: int) -> int:
    """Left edge of the middle columns, which `hold_out_middle` keeps for the evaluation."""
    return (width - crop) // 2


class Images(Dataset[Tensor]):
    """A dataset of known length whose items are float32 (C, H, W) in [-1, 1]."""

    def __len__(self) -> int:
        raise NotImplementedError


class RandomCrops(Images):
    """Item i: a picture, a place and a mirroring that depend on (seed, i) alone, whoever asks and whenever.

    With `hold_out_middle` no crop touches the middle `crop` columns of a picture.
    """

    items_per_epoch = 1 << 16

    def __init__(self, pictures: Pictures, crop: int, *, seed: int, hold_out_middle: bool = False):
        self.pictures, self.crop, self.seed, self.hold_out_middle = pictures, crop, seed, hold_out_middle

    def __len__(self) -> int:
        return self.items_per_epoch

    def __getitem__(self, i: int) -> Tensor:
        draw = generator(self.seed, CROPS, i)
        picture = self.pictures[int(draw.integers(len(self.pictures)))]  # (3, H, W)
        height, width = picture.shape[1:]
        top = int(draw.integers(height - self.crop + 1))
        left, span = 0, width
        if self.hold_out_middle:
            held_out = middle(width, self.crop)
            left, span = (0, held_out) if draw.integers(2) else (held_out + self.crop, width - held_out - self.crop)
        left += int(draw.integers(span - self.crop + 1))
        pixels = picture[:, top : top + self.crop, left : left + self.crop]
        return to_float(pixels.flip(-1) if draw.integers(2) else pixels)


class MiddleCrops(Images):
    """Fixed crops from the middle columns of each picture: `rows` of them from top to bottom, or the central one."""

    def __init__(self, pictures: Pictures, crop: int, *, rows: int):
        self.pictures, self.crop, self.rows = pictures, crop, rows

    def __len__(self) -> int:
        return len(self.pictures) * self.rows

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        picture = self.pictures[i // self.rows]  # (3, H, W)
        slack = picture.shape[1] - self.crop
        top = slack * (i % self.rows) // (self.rows - 1) if self.rows > 1 else slack // 2
        left = middle(picture.shape[2], self.crop)
        return to_float(picture[:, top : top + self.crop, left : left + self.crop])


class Tiles(Images):
    """All crops of a grid over each picture, row by row; what is left over at its borders is halved between its sides."""

    def __init__(self, pictures: Pictures, crop: int):
        self.pictures, self.crop = pictures, crop
        self.places = [(i, top, left) for i in range(len(pictures)) for top, left in self.grid(pictures[i])]

    def grid(self, picture: Tensor) -> list[tuple[int, int]]:
        """Top and left of each crop."""
        tops, lefts = (range(side % self.crop // 2, side - self.crop + 1, self.crop) for side in picture.shape[1:])
        return [(top, left) for top in tops for left in lefts]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Tensor:
        picture, top, left = self.places[i]
        return to_float(self.pictures[picture][:, top : top + self.crop, left : left + self.crop])
