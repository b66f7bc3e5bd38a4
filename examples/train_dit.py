"""A DiT script's loop, its losses, moving average and sampling on fused operators; the calls are those of DiT's own scripts.

    python examples/train_dit.py --steps 600 --out stripes.png

Learns 8 x 8 stripes, across for class 0 and down for class 1, and draws some of both. A script with a model and a diffusion of
its own keeps them: `mk.patch([model, diffusion]); update_ema = mk.update_ema`.
"""

import argparse
import copy
import time

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen.models import DiT, DiTConfig


def stripes(batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1], (B, 1, 8, 8), and their classes, (B,)."""
    y = torch.randint(0, 2, (batch_size,), generator=generator)
    phase = 6.28 * torch.rand(batch_size, 1, 1, 1, generator=generator)
    wave = torch.sin(torch.arange(8) * 1.6 + phase)  # (B, 1, 1, 8)
    down = wave.expand(-1, -1, 8, -1)
    return torch.where(y[:, None, None, None] == 0, down.mT, down), y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--sampling-steps", default="25")
    parser.add_argument("--out", help="write a picture of samples here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = DiTConfig(input_size=8, in_channels=1, patch_size=2, hidden_size=96, depth=3, num_heads=3, num_classes=2)
    model = DiT(config).to(options.device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    diffusion = mk.create_diffusion(timestep_respacing="")  # 1000 steps, learned variance, as DiT's scripts have it
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    start = time.perf_counter()
    for step in range(options.steps):
        x, y = (tensor.to(options.device) for tensor in stripes(32, generator))
        t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=x.device)
        loss = diffusion.training_losses(model, x, t, {"y": y})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mk.update_ema(ema, model, decay=min(0.99, step / (step + 10)))
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}  {(time.perf_counter() - start) / (step + 1) * 1e3:.0f} ms a step")

    y = torch.arange(8, device=options.device) % 2
    z = torch.randn(8, 1, 8, 8, device=options.device)
    samples = mk.create_diffusion(options.sampling_steps).p_sample_loop(ema, z.shape, z, model_kwargs={"y": y})  # (8, 1, 8, 8)
    across = (samples.diff(dim=3).abs().mean((1, 2, 3)) < samples.diff(dim=2).abs().mean((1, 2, 3))).long()
    print(f"samples striped as their class asks: {(across == 1 - y).sum().item()} of {len(y)}")
    if options.out:
        from PIL import Image

        from mmgen.data.crops import to_pixels

        Image.fromarray(to_pixels(torch.cat(list(samples.clamp(-1, 1).cpu()), dim=2), enlarged=12)).save(options.out)


if __name__ == "__main__":
    main()
