"""Peak memory of one quantizer step, forward and backward, beyond what the model and the latents hold before it.

On CUDA it is the allocator's peak. On the CPU it is the operating system's: the high-water mark of the resident set of
a fresh process, which sees scratch memory that PyTorch's own counters do not.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from mmgen.models.quantizers import QUANTIZERS, Quantizer
from mmgen.models.vqvae import VQVAEConfig

HOW = {
    "cuda": "torch.cuda.max_memory_allocated over one step, less what was allocated before it",
    "cpu": "high-water mark of the resident set over one step in a fresh process, less the resident set before it",
}


def peak_memory(config: VQVAEConfig, tokens: int, *, device: torch.device, threads: int) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        return _peak_on_cuda(config, tokens, device)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_process:
        return fresh_process.submit(_peak_on_cpu, config, tokens, threads).result()


def _prepare(config: VQVAEConfig, device: torch.device) -> Quantizer:
    """The quantizer, after a step of one token that has loaded the libraries and started the threads."""
    torch.manual_seed(0)
    kind = QUANTIZERS[config.quantizer]
    quantizer = kind(config.codebook_size, config.codebook_dim, l2_normalize=config.l2_normalize).to(device)
    _step(quantizer, torch.randn(1, config.codebook_dim, 1, 1, device=device))
    quantizer.zero_grad()
    return quantizer


def _step(quantizer: Quantizer, z: torch.Tensor) -> None:
    out = quantizer(z.requires_grad_())
    (out.quantized.sum() + out.loss).backward()


def _peak_on_cuda(config: VQVAEConfig, tokens: int, device: torch.device) -> int:
    quantizer = _prepare(config, device)
    z = torch.randn(1, config.codebook_dim, tokens, 1, device=device)  # (1, D, N, 1)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _step(quantizer, z)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(config: VQVAEConfig, tokens: int, threads: int) -> int | None:
    torch.set_num_threads(threads)
    quantizer = _prepare(config, torch.device("cpu"))
    z = torch.randn(1, config.codebook_dim, tokens, 1)  # (1, D, N, 1)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present resident set
        before = _resident_set("VmRSS")
        _step(quantizer, z)
        return _resident_set("VmHWM") - before
    except OSError:
        return None


def _resident_set(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
