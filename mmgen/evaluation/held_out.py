"""What a model does on images that it was not trained on."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmgen.evaluation.metrics import code_counts, perplexity, psnr, usage
from mmgen.models import VQVAE


@torch.no_grad()
def evaluate(model: VQVAE, dataset: Dataset[Tensor], *, batch_size: int, device: torch.device) -> dict[str, float]:
    """Mean PSNR of the images, reconstructions clamped to the pixel range; usage and perplexity over all tokens."""
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64, device=device)  # (K,)
    ratios = []
    for image in DataLoader(dataset, batch_size=batch_size, generator=torch.Generator()):  # (B, C, H, W)
        image = image.to(device)
        out = model(image)
        counts += code_counts(out.indices, len(counts))
        ratios.append(psnr(out.image.clamp(-1, 1), image))
    values = torch.stack([torch.cat(ratios).double().mean(), usage(counts), perplexity(counts), counts.sum().double()])
    return dict(zip(("psnr", "usage", "perplexity", "tokens"), values.tolist(), strict=True))


@torch.no_grad()
def reconstruct(model: VQVAE, image: Tensor) -> Tensor:
    """One image (C, H, W) in [-1, 1] -> its reconstruction in [-1, 1], cropped to whole tokens."""
    height, width = (side - side % model.config.downsampling for side in image.shape[1:])
    device = next(model.parameters()).device
    return model(image[None, :, :height, :width].to(device)).image[0].clamp(-1, 1).cpu()
