"""Two quantizers with the same parameters, the same start and the same gradients; only the lookup differs."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmgen_kernels as mk


class Quantized(NamedTuple):
    """What a quantizer returns."""

    quantized: Tensor  # (B, D, H, W), gradient straight through to the latents
    loss: Tensor  # (), codebook_loss + beta * commitment_loss
    indices: Tensor  # (B, H, W), int64


class Quantizer(nn.Module):
    """Replaces each latent by its nearest code; `lookup` is what the two subclasses do differently.

    With `l2_normalize`, latents and codes are put on the unit sphere first, as LlamaGen's tokenizer does (after
    ViT-VQGAN), so that the losses are bounded and no code is out of reach because of its length.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, *, l2_normalize: bool = True, beta: float = 0.25):
        super().__init__()
        self.l2_normalize = l2_normalize
        self.beta = beta
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        if l2_normalize:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def forward(self, z: Tensor) -> Quantized:
        x, codebook = self.project(z), self.codebook()  # (B, H, W, D), (K, D)
        quantized, loss, indices = self.lookup(x, codebook)
        return Quantized(quantized.permute(0, 3, 1, 2), loss, indices)

    def lookup(self, x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def project(self, z: Tensor) -> Tensor:
        """Latents (B, D, H, W) as the rows that are compared with the codes, (B, H, W, D)."""
        x = z.permute(0, 2, 3, 1)
        return F.normalize(x, dim=-1) if self.l2_normalize else x

    def codebook(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_normalize else self.embedding.weight

    def codes(self, indices: Tensor) -> Tensor:
        """Codes of (B, H, W) indices, (B, D, H, W)."""
        return F.embedding(indices, self.codebook()).permute(0, 3, 1, 2)

    @torch.no_grad()
    def revive_(self, z: Tensor, counts: Tensor, turn: int) -> None:
        """Lets codes that `counts` (K,) did not see used start again from latents of z (B, D, H, W).

        Each turn looks at as many codes as there are latents, the next turn at the next ones, and a code's place says
        which latent it may take: no latent is given away twice, no random number is drawn, nothing is read back from
        the device, and one code more or less in use changes what happens to that code alone.
        """
        rows = self.project(z).flatten(0, 2)  # (N, D)
        size = min(len(rows), len(counts))
        turns = -(-len(counts) // size)
        start = turn % turns * size
        block = slice(start, start + size)  # the last one may be shorter
        unused = counts[block] == 0  # (S,)
        codes = self.embedding.weight[block]  # (S, D)
        codes.copy_(torch.where(unused[:, None], rows[: len(codes)], codes))


class StockQuantizer(Quantizer):
    """What training scripts do today (the expressions of taming-transformers and LlamaGen): the whole N x K matrix."""

    def lookup(self, x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        distances = (  # (N, K)
            flat.pow(2).sum(dim=1, keepdim=True)
            + codebook.pow(2).sum(dim=1)
            - 2 * torch.einsum("nd,kd->nk", flat, codebook)
        )
        indices = distances.argmin(dim=1).view(x.shape[:-1])  # (B, H, W)
        quantized = F.embedding(indices, codebook)  # (B, H, W, D)
        codebook_loss = F.mse_loss(quantized, x.detach())
        commitment_loss = F.mse_loss(x, quantized.detach())
        quantized = x + (quantized - x).detach()
        return quantized, codebook_loss + self.beta * commitment_loss, indices


class FusedQuantizer(Quantizer):
    """The same in one operator that never holds the N x K matrix, and whose indices are exact."""

    def lookup(self, x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = mk.vector_quantize(x, codebook, beta=self.beta)
        return out.quantized, out.loss, out.indices


QUANTIZERS = {"stock": StockQuantizer, "fused": FusedQuantizer}
