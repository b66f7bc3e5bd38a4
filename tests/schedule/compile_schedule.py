"""Compiles the family's kernels for chips that are not there, and prints what the machine code holds, a line of JSON each.

A script of its own, as a process in which TRITON_INTERPRET is set cannot compile. Arguments: [[configuration, capability], ...] as
JSON.
"""

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from triton_compile import machine_code
from triton_launches import Recorder

from mmgen_kernels.schedule.triton_kernels import (
    add_noise,
    diffusion_loss,
    diffusion_loss_backward,
    guidance,
    hybrid_loss,
    hybrid_loss_backward,
    scheduler_step,
    unmask_step,
    vq_diffusion_loss,
    vq_diffusion_loss_backward,
    vq_diffusion_step,
)
from mmgen_kernels.schedule.triton_kernels import pieces as pieces_of_samples

add_noise_module = sys.modules["mmgen_kernels.schedule.triton_kernels.add_noise"]
step_module = sys.modules["mmgen_kernels.schedule.triton_kernels.scheduler_step"]
diffusion_module = sys.modules["mmgen_kernels.schedule.triton_kernels.diffusion_loss"]
hybrid_module = sys.modules["mmgen_kernels.schedule.triton_kernels.hybrid_loss"]
KERNELS = {"take_step": step_module, "add_up": step_module, "noise_samples": add_noise_module}
KERNELS["draw_codes"] = sys.modules["mmgen_kernels.schedule.triton_kernels.discrete"]
KERNELS["lose_places"] = sys.modules["mmgen_kernels.schedule.triton_kernels.discrete_loss"]
KERNELS |= dict.fromkeys(("lose", "lose_samples", "average", "slope_of_loss"), diffusion_module)
KERNELS |= dict.fromkeys(("lose_terms", "lose_hybrid", "slope_of_terms"), hybrid_module)
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DDIM = torch.tensor([[1.4, -0.9, 0, 0], [0.35, 0.2, 0.6, 0], [0, 0, 1, 0]], dtype=FP64)
ANCESTRAL = torch.tensor([[1, -2.0, 0, 0], [1, -0.5, 0, 0.7], [0, 0, 1, 0]], dtype=FP64)
FULL = torch.arange(1, 29, dtype=FP64).view(4, 7)
LEARNED = torch.cat((ANCESTRAL, torch.tensor([[-6.0, -0.5, 0, 0]], dtype=FP64)))


def step(rows, dtype=BF16, shape=(2, 16, 64), mixed=None, **options):
    """A call of scheduler_step on tensors whose values nobody looks at; `mixed`: the dtype of all but the first."""
    n, outputs = rows.shape[-1] - 2, len(rows) - 1 - ("variance" in options)
    tensor = torch.empty(shape, dtype=dtype)
    other = torch.empty(shape, dtype=mixed or dtype)
    more = [*[other] * (n - 1), *[None] * (5 - n)]
    uncond, noise, variance = (other if options.get(name) else None for name in ("uncond", "noise", "variance"))
    key = torch.zeros({"one": (2,), "each": (shape[0], 2)}[options["key"]], dtype=torch.int64) if "key" in options else None
    index = torch.zeros((), dtype=torch.int64) if options.get("on_device") else None
    dtypes = [dtype if k < outputs else None for k in range(3)]
    scheduler_step(
        tensor, rows[None], 0, dtypes[0], more[0], dtypes[1], *more[1:], dtypes[2], options.get("clamp"), noise, key, index, uncond,
        0, 7.5, options.get("rescale", 0.0), variance, options.get("threshold"), 1.5,
    )  # fmt: skip


def noised(path, target, dtype=BF16, by_index=False, key=None, shape=(2, 16, 64)):
    tensor = torch.empty(shape, dtype=dtype)
    keys = None if key is None else torch.zeros({"one": (2,), "each": (shape[0], 2)}[key], dtype=torch.int64)
    t = torch.zeros(shape[0], dtype=torch.int64) if by_index else torch.zeros(shape[0])
    add_noise(tensor, tensor if key is None else None, keys, t, torch.ones(10, dtype=FP64) if by_index else None, path, target)


def lost(kind, dtype=BF16, shape=(2, 16, 64), mask=False, by_sample=False, mean=True, wide_target=False):
    """Forward and backward of diffusion_loss."""
    output, target = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=FP32 if wide_target else dtype)
    valid = torch.empty(shape, dtype=torch.bool) if mask else None
    of_samples = torch.empty(shape[0]) if by_sample else None
    given = (output, target, of_samples, valid, of_samples)
    _, means = diffusion_loss(*given, kind, 0.1, mean)
    upstream = means.new_empty(() if mean else shape[:1])
    diffusion_loss_backward(upstream, means if by_sample else None, *given, means, kind, 0.1, mean, True, True, by_sample)


def bounded(dtype=BF16, shape=(2, 16, 64), wide=None, learned=True, kl=False, clamp=None):
    """Forward and backward of hybrid_loss; `wide`: the dtype of x0 and noise."""
    x0 = torch.empty(shape, dtype=wide or dtype)
    output = torch.empty((shape[0], shape[1] * (2 if learned else 1), *shape[2:]), dtype=dtype)
    given = (output, x0, x0, torch.zeros(shape[0], dtype=torch.int64), torch.zeros(10, 7, dtype=FP64), 0.5, kl, clamp)
    loss, mse, _ = hybrid_loss(*given)
    hybrid_loss_backward(loss, mse, None, *given)


def drawn(operator, dtype=BF16, shape=(2, 32, 1024), codes_first=False, key="one", on_device=False, temperature=1.0):
    """A call of vq_diffusion_step or unmask_step; without a key the exponentials are given."""
    B, N, K = shape
    logits = torch.empty(B, K, N, dtype=dtype).mT if codes_first else torch.empty(shape, dtype=dtype)
    codes, index = torch.zeros(B, N, dtype=torch.int64), torch.zeros((), dtype=torch.int64) if on_device else None
    keys = None if key is None else torch.zeros({"one": (2,), "each": (B, 2)}[key], dtype=torch.int64)
    wide = dtype if dtype == FP64 else FP32
    if operator == "diffuse":
        noise = torch.empty(B, N, K + 1, dtype=wide) if key is None else None
        vq_diffusion_step(logits, codes, noise, torch.ones(10, 9, dtype=FP64), index, keys, 0, temperature, True)
    else:
        noise = torch.empty(shape, dtype=wide) if key is None else None
        wait = torch.empty(B, N, dtype=wide) if key is None else None
        unmask_step(logits, codes, noise, wait, torch.ones(10, 2, dtype=FP64), index, keys, 0, 7, temperature)


def lost_codes(dtype=BF16, shape=(2, 32, 1024), codes_first=False, on_device=False, mask=False, aux=None):
    """A call of vq_diffusion_loss and of its backward."""
    B, N, K = shape
    logits = torch.empty((B, K, N) if codes_first else shape, dtype=dtype)
    codes, index = torch.zeros(B, N, dtype=torch.int64), torch.zeros(B, dtype=torch.int64) if on_device else None
    of = (logits, codes, codes, torch.ones(10, 9, dtype=FP64), index, None, None, codes > 0 if mask else None)
    rest = (0, aux, codes_first, "none")
    loss, *_, places = vq_diffusion_loss(*of, *rest)
    vq_diffusion_loss_backward(loss, None, None, *of, places, *rest)


ODD = (2, 3, 5)
CONFIGURATIONS = {
    "ddim": lambda: step(DDIM),
    "ddim_fp32": lambda: step(DDIM, FP32),
    "ddim_fp64": lambda: step(DDIM, FP64),
    "ddim_mixed": lambda: step(DDIM, FP32, mixed=BF16),
    "ddim_odd": lambda: step(DDIM, shape=ODD),
    "ddim_clamp": lambda: step(DDIM, FP32, clamp=1.0),
    "ancestral_noise": lambda: step(ANCESTRAL, noise=True),
    "ancestral_key": lambda: step(ANCESTRAL, key="one"),
    "ancestral_keys": lambda: step(ANCESTRAL, FP32, key="each"),
    "ancestral_key_odd": lambda: step(ANCESTRAL, FP16, shape=ODD, key="one"),
    "on_device": lambda: step(ANCESTRAL, key="one", on_device=True),
    "on_device_clamp": lambda: step(ANCESTRAL, FP32, key="one", on_device=True, clamp=1.0),
    "on_device_full": lambda: step(FULL, key="each", on_device=True, uncond=True),
    "full": lambda: step(FULL, key="one", clamp=1.0, uncond=True),
    "full_fp32": lambda: step(FULL, FP32, key="one", clamp=1.0, uncond=True),
    "learned": lambda: step(LEARNED, FP32, key="one", variance=True, clamp=1.0),
    "learned_on_device": lambda: step(LEARNED, noise=True, variance=True, on_device=True),
    "rescale": lambda: step(DDIM, FP32, uncond=True, rescale=0.7),
    "threshold": lambda: step(DDIM, FP32, threshold=0.9),
    "guidance": lambda: guidance(torch.empty(2, 64, dtype=BF16), torch.empty(2, 64, dtype=BF16), 7.5, 0.0),
    "guidance_rescale": lambda: guidance(torch.empty(2, 64, dtype=BF16), torch.empty(2, 64, dtype=BF16), 7.5, 0.7),
    **{
        f"noise_{path}_{target}": lambda p=path, t=target: noised(p, t)
        for path, target in (("linear", "flow"), ("gvp", "v"), ("edm", "sample"), ("vp", "flow"), ("vp", "epsilon"))
    },
    "noise_index": lambda: noised("vp", "v", FP32, by_index=True),
    "noise_index_key": lambda: noised("vp", "v", by_index=True, key="each"),
    "noise_key": lambda: noised("linear", "flow", FP32, key="one"),
    "noise_key_odd": lambda: noised("linear", None, FP16, key="one", shape=ODD),
    "noise_fp64": lambda: noised("gvp", "flow", FP64),
    **{f"loss_{kind}": lambda k=kind: lost(k) for kind in ("mse", "huber", "smooth_l1", "pseudo_huber")},
    "loss_fp32": lambda: lost("pseudo_huber", FP32, by_sample=True, mean=False),
    "loss_fp64": lambda: lost("pseudo_huber", FP64),
    "loss_mask": lambda: lost("mse", FP32, mask=True),
    "loss_mixed": lambda: lost("huber", wide_target=True),
    "loss_odd": lambda: lost("mse", FP16, shape=ODD),
    "hybrid": lambda: bounded(),
    "hybrid_fp32": lambda: bounded(FP32),
    "hybrid_fp64": lambda: bounded(FP64),
    "hybrid_mixed": lambda: bounded(wide=FP32),
    "hybrid_kl": lambda: bounded(FP32, kl=True),
    "hybrid_kl_clamp": lambda: bounded(FP32, kl=True, clamp=1.0),
    "hybrid_fixed": lambda: bounded(learned=False, kl=True),
    "hybrid_odd": lambda: bounded(FP32, shape=ODD),
    "bound": lambda: lost_codes(),
    "bound_fp32": lambda: lost_codes(FP32, aux=0.1),
    "bound_fp64": lambda: lost_codes(FP64),
    "bound_codes_first": lambda: lost_codes(FP32, codes_first=True),
    "bound_codes_first_fp64": lambda: lost_codes(FP64, codes_first=True),
    "bound_on_device": lambda: lost_codes(FP16, on_device=True, mask=True, aux=0.1),
    "diffuse": lambda: drawn("diffuse"),
    "diffuse_fp32": lambda: drawn("diffuse", FP32),
    "diffuse_fp64": lambda: drawn("diffuse", FP64),
    "diffuse_codes_first": lambda: drawn("diffuse", FP32, codes_first=True),
    "diffuse_codes_first_fp64": lambda: drawn("diffuse", FP64, codes_first=True),
    "diffuse_on_device": lambda: drawn("diffuse", key="each", on_device=True),
    "diffuse_noise": lambda: drawn("diffuse", FP32, key=None),
    "unmask": lambda: drawn("unmask"),
    "unmask_fp64": lambda: drawn("unmask", FP64, key="each"),
    "unmask_codes_first": lambda: drawn("unmask", codes_first=True),
    "unmask_likeliest": lambda: drawn("unmask", FP32, temperature=0.0, on_device=True),
    "unmask_noise": lambda: drawn("unmask", FP16, key=None),
}


def describe(compiled):
    ptx = compiled.asm["ptx"]
    widest = max((int(count) * int(bits) for count, bits in re.findall(r"ld\.global\S*\.v(\d)\.b(\d+)", ptx)), default=0)
    return machine_code(compiled) | {"fp32_fused": ptx.count("fma.rn.f32"), "widest_load": widest}


def facts(configuration, capability):
    found = []
    for name, module in KERNELS.items():
        setattr(module, name, Recorder(ORIGINALS[name], capability, found, describe))
    CONFIGURATIONS[configuration]()
    return found


if __name__ == "__main__":
    ORIGINALS = {name: getattr(module, name) for name, module in KERNELS.items()}
    assert pieces_of_samples.BLOCK  # the figures are of this one
    for request in json.loads(sys.argv[1]):
        print(json.dumps(facts(*request)), flush=True)
