"""A VQ-VAE whose quantizer is one module: the exact lookup, losses, straight-through gradient and moving averages of the codebook.

    python examples/train_vq_vae.py --steps 200

Learns 32 x 32 pictures of waves. Nothing in the loop waits for the device: the codebook's usage is read once, at the end.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmgen_kernels as mk


def waves(batch_size: int, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1], each the mean of three waves of any direction and length, (B, 1, 32, 32)."""
    direction = 0.6 * torch.randn(batch_size, 3, 2, 1, 1, generator=generator)
    phase = 6.28 * torch.rand(batch_size, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return torch.sin(direction[:, :, 0] * y + direction[:, :, 1] * x + phase).mean(dim=1, keepdim=True)


class VQVAE(nn.Module):
    def __init__(self, num_codes: int = 256, dim: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, dim, 4, 2, 1))
        self.quantize = mk.nn.EMAVectorQuantizer(num_codes, dim, channel_dim=1, dead_code_threshold=0.5)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(dim, 32, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss, *_ = self.quantize(self.encoder(image))  # (B, dim, 8, 8)
        return self.decoder(quantized), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = VQVAE().to(options.device)
    with torch.no_grad():  # a codebook that begins among the data: k-means of a first batch
        model.quantize.initialize(model.encoder(waves(64, generator).to(options.device)), key=torch.tensor([0, 0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(options.steps):
        image = waves(32, generator).to(options.device)
        reconstruction, quantizer_loss = model(image)
        loss = F.mse_loss(reconstruction, image) + quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == options.steps * 3 // 4:
            model.quantize.reset_usage()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    usage, perplexity = model.quantize.epoch_usage()
    print(f"in the last quarter of the steps: codes in use {usage.item():.0%}, perplexity {perplexity.item():.0f}")


if __name__ == "__main__":
    main()
