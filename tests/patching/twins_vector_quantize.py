"""Modules of vector-quantize-pytorch, stock and patched, and their inputs."""

import copy

import torch

import mmgen_kernels as mk

DIM, CODES = 6, 11
MASK = torch.arange(2 * 13).view(2, 13) % 4 != 1


def inputs(module):
    """A fresh draw at every call, from torch's generator: both sides see the same only if they draw the same."""
    if getattr(module, "accept_image_fmap", False):
        shape = (2, DIM, DIM, DIM)  # ResidualVQ of 1.32 takes no other images
    elif getattr(module, "accept_3d_fmap", False):
        shape = (2, DIM, 2, 3, 3)
    elif not getattr(module, "channel_last", True):
        shape = (2, DIM, 13)
    else:
        shape = (2, 13, DIM)
    return lambda: torch.randn(shape)


def patched(module, **options):
    module = copy.deepcopy(module)
    return module, mk.patch(module, **options)
