"""The losses as a training step has them on a GPU: values, bits, what a graph captures, who waits for the device.

Every test runs on the CPU too, so that what is asked of a GPU is known to hold together before there is one.
"""

import pytest
import torch
from on_device import recorded, waits_are_errors

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import same_bits
from mmgen_kernels.battery.schedule.law import BF16, FP16, FP32, FP64

T = 20
TABLE = mk.hybrid_table(torch.linspace(1e-3, 0.3, T))
SERVED = [
    *(("cpu", name) for name in battery.implementations("hybrid_loss", torch.device("cpu"))),
    *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("reference", "triton")),
]
SHAPES = ((1, 1), (3, 2, 5, 7), (5, 3, 1027), (2, 4, 64, 65))  # of x0: within a block of the kernels, past it, off its edge
LOSSES = (  # of diffusion_loss: kind, with a mask and a delta per sample; of hybrid_loss: objective, clamp
    ("mse", False, "hybrid", None),
    ("pseudo_huber", False, "kl", None),
    ("huber", True, "hybrid", 0.9),
    ("smooth_l1", True, "kl", 0.9),
)
by_implementation = pytest.mark.parametrize(("device", "implementation"), SERVED)
by_dtype = pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
by_losses = pytest.mark.parametrize("losses", LOSSES, ids=lambda losses: f"{losses[0]}-{losses[2]}")


def given(shape, dtype, device, seed=0):
    """What a step is made of: the model's output and the noise in `dtype`, the first sample at the step that decodes."""
    x0, noise = (randn(*shape, seed=seed + 1).tanh() * 127.5).round() / 127.5, randn(*shape, seed=seed + 2)
    output = torch.cat((noise + 0.3 * randn(*shape, seed=seed + 3), randn(*shape, seed=seed + 4)), 1)
    B = shape[0]
    tensors = {
        "output": output.to(dtype), "x0": x0.float(), "noise": noise.to(dtype), "t": (torch.arange(B) * 3 + seed) % T,
        "weight": 0.5 + torch.arange(B) / 4, "delta": 0.1 + torch.arange(B) / 8, "mask": randn(*shape, seed=seed + 5) > -0.5,
        "table": TABLE,
    }  # fmt: skip
    tensors["t"][0] = 0
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name in ("output", "weight"):
        tensors[name].requires_grad_()
    return tensors


def step(g, losses):
    """All losses, and the gradients of the model's output and of the weight."""
    kind, selects, objective, clamp = losses
    options = {"mask": g["mask"], "delta": g["delta"]} if selects else {"delta": 0.3}
    found = mk.hybrid_loss(
        g["output"], g["x0"], g["noise"], g["t"], table=g["table"], vb_weight=T / 1000, objective=objective, clamp=clamp
    )
    prediction = g["output"].unflatten(1, (2, -1))[:, 0]  # a slice of each sample
    loss = mk.diffusion_loss(prediction, g["noise"], weight=g["weight"], kind=kind, **options)
    total = (found.loss.mean() + found.vb.sum() + 2 * loss) * g["x0"][0].numel()  # scaled, or slopes in fp16 are subnormal
    slopes = torch.autograd.grad(total, (g["output"], g["weight"]))
    return [*(o.detach() for o in found), loss.detach(), *slopes]


def in_fp64(g):
    """The same numbers on the CPU; what is no float stays what it is."""
    wide = {n: v.detach().cpu().double() if v.is_floating_point() else v.cpu() for n, v in g.items()}
    return wide | {n: wide[n].requires_grad_() for n in ("output", "weight")}


def relative_rms(got, true):
    return float((got.cpu().double() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp(min=1e-300))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_losses
@by_dtype
@by_implementation
def test_values_are_those_of_the_formulas_in_fp64(device, implementation, dtype, losses, shape):
    g = given(shape, dtype, device)
    with mk.use_backend(implementation):
        found = step(g, losses)
    with mk.use_backend("reference"):
        expected = step(in_fp64(g), losses)
    for got, true in zip(found, expected, strict=True):
        units = 16 if got.dtype == FP32 else 1  # what has 16 bits was rounded to them once
        assert got.dtype == (dtype if got.shape == g["output"].shape else FP32)
        assert relative_rms(got, true) <= units * torch.finfo(got.dtype).eps


@by_losses
@by_dtype
@by_implementation
def test_bits_are_the_same_twice_and_whatever_the_batch(device, implementation, dtype, losses):
    g = given((5, 3, 1027), dtype, device)
    alone = {n: v if n == "table" else v.detach()[:2].clone().requires_grad_(v.requires_grad) for n, v in g.items()}
    with mk.use_backend(implementation):
        first, second, few = step(g, losses), step(g, losses), step(alone, losses)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first[:3], few[:3], strict=True):  # of samples; the batch's mean and its gradients know how many there are
        assert same_bits(a[:2], b)


@by_losses
@by_dtype
@by_implementation
def test_a_training_step_in_one_graph_is_the_eager_step(device, implementation, dtype, losses):
    """Forward and backward, run again on other values and timesteps; nobody waits for the device."""
    shape = (3, 2, 33, 31)
    g, other = given(shape, dtype, device), given(shape, dtype, device, seed=7)
    with mk.use_backend(implementation):
        step(g, losses)  # compiles
        with waits_are_errors(device):
            before, expected = step(g, losses), step(other, losses)
        results, again = recorded(lambda: step(g, losses), device)
        with torch.no_grad():
            for name, tensor in g.items():
                tensor.copy_(other[name])
        again()
        again()
    assert not any(same_bits(a, b) for a, b in zip(before, expected, strict=True))
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


def test_the_checks_can_fail():
    """A result that is off by little, or that a graph did not make again, is found."""
    g = given((3, 2, 5, 7), FP32, "cpu")
    found = step(g, LOSSES[0])
    assert all(relative_rms(r * (1 + 1e-5), r.double()) > 16 * torch.finfo(FP32).eps for r in found)
    assert in_fp64(g)["output"].dtype == FP64 and in_fp64(g)["t"].dtype == torch.int64
    results, again = recorded(lambda: [g["x0"] * 2], "cpu")
    g["x0"].add_(1)
    assert not same_bits(results[0], g["x0"] * 2)
    again()
    assert same_bits(results[0], g["x0"] * 2)
