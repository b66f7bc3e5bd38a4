"""What a model does on images that it was not trained on."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmgen.evaluation.metrics import code_counts, detail, perplexity, psnr, usage
from mmgen.models import VQVAE, Autoencoder


@torch.no_grad()
def evaluate(model: Autoencoder, dataset: Dataset[Tensor], *, batch_size: int, device: torch.device) -> dict[str, float]:
    """Of reconstructions clamped to the pixel range: the images' mean PSNR, and their detail as a share of the originals'.

    Of a model with a codebook also its usage and perplexity over all tokens.
    """
    codes = model.config.codebook_size if isinstance(model, VQVAE) else 0
    counts = torch.zeros(codes, dtype=torch.int64, device=device)  # (K,)
    ratios, details = [], []
    for image in DataLoader(dataset, batch_size=batch_size, generator=torch.Generator()):  # (B, C, H, W)
        image = image.to(device)
        out = model(image)
        reconstruction = out.image.clamp(-1, 1)
        ratios.append(psnr(reconstruction, image))
        details.append(torch.stack([detail(reconstruction), detail(image)]))  # (2, B)
        if isinstance(model, VQVAE):
            counts += code_counts(out.indices, len(counts))
    reconstructed, original = torch.cat(details, dim=1).double().sum(dim=1)
    scores = {"psnr": torch.cat(ratios).double().mean(), "detail": reconstructed / original}
    if isinstance(model, VQVAE):
        scores |= {"usage": usage(counts), "perplexity": perplexity(counts), "tokens": counts.sum().double()}
    return dict(zip(scores, torch.stack([*scores.values()]).tolist(), strict=True))


@torch.no_grad()
def reconstruct(model: Autoencoder, image: Tensor) -> Tensor:
    """One image (C, H, W) in [-1, 1] -> its reconstruction in [-1, 1], cropped to whole tokens."""
    height, width = (side - side % model.config.downsampling for side in image.shape[1:])
    device = next(model.parameters()).device
    return model(image[None, :, :height, :width].to(device)).image[0].clamp(-1, 1).cpu()
