"""Measures of a tokenizer. All stay on the device; none waits for it."""

import torch
from torch import Tensor

PIXEL_RANGE = 2.0  # images live in [-1, 1]


def psnr(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,); inf where nothing differs."""
    error = (reconstruction - image).square().flatten(1).mean(dim=1)  # (B,)
    return 10 * torch.log10(PIXEL_RANGE**2 / error)


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code was chosen, int64 (K,). Integers, so that the order of the additions changes nothing."""
    flat = indices.flatten()  # (N,)
    return flat.new_zeros(codebook_size).scatter_add_(0, flat, torch.ones_like(flat))


def usage(counts: Tensor) -> Tensor:
    """Share of the codes that were chosen at least once, ()."""
    return (counts > 0).double().mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the chosen codes, (): as many codes as a uniform choice with this entropy would use.

    Both this and `usage` grow with the number of tokens counted: one batch cannot use more codes than it has tokens.
    """
    share = counts.double() / counts.sum()  # (K,)
    return torch.exp(-torch.special.xlogy(share, share).sum())
