"""A sampling loop with a diffusers scheduler, before and after `mk.patch(scheduler)`: the same calls, the same samples, less time.

    python examples/sample_with_diffusers.py --scheduler UniPCMultistepScheduler

The model's outputs are made beforehand, so that the time is the scheduler's. Without diffusers the scheduler is the class of that
name in `mk.schedulers`, which has the same config and calls.
"""

import argparse
import inspect
import time
from typing import Any

import torch
from torch import Tensor

import mmgen_kernels as mk


def run(scheduler: Any, noise: Tensor, steps: int) -> tuple[Tensor, float]:
    """A loop as any pipeline has it; the sample, and milliseconds a step."""
    scheduler.set_timesteps(steps, device=noise.device)
    generator = torch.Generator(noise.device).manual_seed(1)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * scheduler.init_noise_sigma
    outputs = [torch.sin(noise + i) for i in range(len(scheduler.timesteps))]  # of a model, (B, C, H, W) each
    start = time.perf_counter()
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x, (time.perf_counter() - start) / len(outputs) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheduler", default="UniPCMultistepScheduler")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    noise = torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to(options.device)
    try:
        import diffusers
    except ModuleNotFoundError:
        scheduler = getattr(mk.schedulers, options.scheduler)()
        _, ours = min((run(scheduler, noise, options.steps) for _ in range(5)), key=lambda found: found[1])
        print(f"diffusers is not installed; mk.schedulers.{options.scheduler}: {ours:.3f} ms a step")
        return
    scheduler = getattr(diffusers, options.scheduler)()
    stock, before = min((run(scheduler, noise, options.steps) for _ in range(5)), key=lambda found: found[1])
    with mk.patch(scheduler) as handle:
        fused, after = min((run(scheduler, noise, options.steps) for _ in range(5)), key=lambda found: found[1])
        print(handle.report())
    difference = ((fused - stock).norm() / stock.norm()).item()
    print(f"stock {before:.3f} ms a step, patched {after:.3f}; difference {difference:.1e} of the sample")


if __name__ == "__main__":
    main()
