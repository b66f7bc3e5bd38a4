"""Measures of a tokenizer. All stay on the device; none waits for it."""

import torch
from torch import Tensor

PIXEL_RANGE = 2.0  # images live in [-1, 1]
SHORT_WAVES = 0.25  # cycles per pixel, half of what pixels can carry


def psnr(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,); inf where nothing differs."""
    return decibels((reconstruction - image).square().flatten(1).mean(dim=1))


def decibels(error: Tensor) -> Tensor:
    """A mean square error of pixels as a peak signal-to-noise ratio, of its shape."""
    return 10 * torch.log10(PIXEL_RANGE**2 / error)


def detail(image: Tensor) -> Tensor:
    """Energy of images (B, C, H, W) in waves shorter than four pixels, (B,): what blur takes away first.

    Squares of the Fourier coefficients at and above a quarter of a cycle per pixel, in any direction, of the image less its mean,
    faded out towards its edges (Hann), where an image that does not repeat has a step.
    """
    height, width = image.shape[2:]
    window = torch.outer(*(torch.hann_window(side, device=image.device) for side in (height, width)))  # (H, W)
    waves = torch.fft.fft2((image - image.mean(dim=(2, 3), keepdim=True)) * window, norm="ortho")  # (B, C, H, W)
    down, right = (torch.fft.fftfreq(side, device=image.device) for side in (height, width))
    short = torch.hypot(down[:, None], right) >= SHORT_WAVES  # (H, W)
    return (waves.abs().square() * short).flatten(1).sum(dim=1)


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
