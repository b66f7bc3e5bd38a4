"""Features of small patches by a fixed random network: nothing to download, the same numbers on every machine."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk

KEY = (20161, 0)
LAYERS = ((32, 5, 2), (64, 3, 2), (64, 3, 1))  # channels, kernel, stride; a feature sees 17 x 17 pixels


def patch_features(images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> a feature of every fourth patch, (B h w, 64).

    Convolutions with normal weights of variance ``2 / fan_in`` and a rectifier after each: random weights tell textures apart
    (Ustyuzhaninov et al. 2016), and no loss of ours has seen them.
    """
    key, h = torch.tensor(KEY), images
    for i, (channels, kernel, stride) in enumerate(LAYERS):
        shape = (channels, h.shape[1], kernel, kernel)
        weight = mk.philox_normal(shape, mk.fold_in(key, i)).to(h) * math.sqrt(2 / math.prod(shape[1:]))
        h = F.relu(F.conv2d(h, weight, stride=stride))  # (B, channels, h, w)
    return h.permute(0, 2, 3, 1).flatten(0, 2)
