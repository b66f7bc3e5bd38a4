"""How many bits a model needs for each code of pictures that nobody has seen, and what trivial models need."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mmgen_kernels as mk
from mmgen.models import VQVAE


@dataclass(frozen=True)
class Bits:
    """Per code."""

    mean: float
    standard_error: float = 0.0  # of the numbers drawn, where there are any; the pictures are what they are


@torch.no_grad()
def encoded(tokenizer: VQVAE, images: Dataset[Tensor], *, batch_size: int, device: torch.device) -> Tensor:
    """Codes of images, row by row, (M, T)."""
    batches = DataLoader(images, batch_size=batch_size, generator=torch.Generator())
    return torch.cat([tokenizer.encode(image.to(device)).indices.flatten(1) for image in batches])


@torch.no_grad()
def bits_per_code(
    nats: Callable[[Tensor, Tensor], Tensor], codes: Tensor, *, key: Tensor, batch_size: int, replicates: int = 1
) -> Bits:
    """Mean over the pictures `codes` (M, T) of ``nats(codes, key)``, (B,), in bits per code.

    Each of the replicates draws anew for all pictures; the standard error is that of their mean.
    """
    means = []
    for replicate in range(replicates):
        parts = enumerate(codes.split(batch_size), replicate * len(codes))
        means.append(torch.cat([nats(part, mk.fold_in(key, i)) for i, part in parts]).double().mean())
    bits = torch.stack(means) / (codes.shape[1] * math.log(2))  # (R,)
    return Bits(bits.mean().item(), (bits.std() / replicates**0.5).item() if replicates > 1 else 0.0)


class Bigram:
    """Counts of codes and of pairs, each code and the one before it row by row, as Witten and Bell smoothe them.

    ``p(b | a) = (n(a, b) + d(a) p(b)) / (n(a) + d(a))`` with d(a) different codes seen after a; ``p(b) = (n(b) + 1) / (n + K)``.

    Source: Witten and Bell, The Zero-Frequency Problem, 1991, method C.
    """

    def __init__(self, codes: Tensor, num_codes: int):
        """codes (M, T)."""
        before, after = pairs(codes, num_codes)
        counts = torch.bincount(before * num_codes + after, minlength=(num_codes + 1) * num_codes)
        counts = counts.view(num_codes + 1, num_codes).double()  # (K + 1, K): the last row is of first codes
        alone = counts.sum(dim=0)  # (K,)
        self.num_codes, self.alone = num_codes, (alone + 1) / (alone.sum() + num_codes)
        followers = (counts > 0).sum(dim=1, keepdim=True).clamp(min=1)  # (K + 1, 1); what was never seen is followed by anything
        self.after = (counts + followers * self.alone) / (counts.sum(dim=1, keepdim=True) + followers)  # (K + 1, K)

    def bits(self, codes: Tensor) -> tuple[float, float]:
        """Per code of pictures (M, T): by each code's share alone, and by pairs."""
        before, after = pairs(codes, self.num_codes)
        alone, paired = self.alone[after], self.after[before, after]
        return -alone.log2().mean().item(), -paired.log2().mean().item()


def pairs(codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Each code of pictures (M, T) and the one before it, `num_codes` at the start; (M T,) both."""
    before = torch.nn.functional.pad(codes, (1, 0), value=num_codes)[:, :-1]  # (M, T)
    return before.flatten(), codes.flatten()


def entropy(codes: Tensor, num_codes: int) -> float:
    """Of the shares of codes in the pictures themselves, in bits: no model of single codes does better on them."""
    share = torch.bincount(codes.flatten(), minlength=num_codes).double() / codes.numel()  # (K,)
    return -torch.special.xlogy(share, share).sum().item() / math.log(2)
