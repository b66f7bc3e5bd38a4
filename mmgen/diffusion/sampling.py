"""Samples from a class-conditional model: classifier-free guidance, and steps of any sampler.

A sampler named by class and config runs on the table of `mk.schedulers.plan`: one operator a step does guidance, prediction, update
and noise.
An object with the interface of diffusers' schedulers runs as it is.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen.models import DiT

START, STEPS = 0, 1  # streams of a sample's key
PAIR = ("sample", "model_output")
AT_MOST = 5  # inputs of mk.scheduler_step
LEARNED = ("learned", "learned_range")  # variance_type of a scheduler that takes the variance behind the prediction
Named = tuple[str, Mapping[str, Any]]  # of diffusers: class name, config


@torch.no_grad()
def sample(
    model: DiT,
    labels: Tensor,
    scheduler: Any,
    num_inference_steps: int,
    *,
    key: Tensor,
    guidance_scale: float = 1.0,
) -> Tensor:
    """One sample for each label.

    Each has a key of its own, ``fold_in(key, i)``: with a named scheduler sample i starts from the same noise and meets the same
    noise however many are drawn.

    Args:
        model: in eval mode.
        labels: (B,), int64.
        scheduler: (class name, config) of diffusers, what `mk.schedulers.plan` plans; or an object with set_timesteps,
            timesteps, step and, where it has them, scale_model_input and init_noise_sigma.
        num_inference_steps: evaluations of the model, each with half a batch more for guidance.
        key: int64 (2,), on the labels' device.
        guidance_scale: 1 is none; more leads towards what the label is likely for (Ho and Salimans 2022).

    Returns:
        (B, C, S, S), not clamped.

    Raises:
        ValueError: the model was trained without dropped labels and is to be guided, the scheduler cannot be planned, or it reads a
            variance that the model does not say.
    """
    keys = mk.fold_in(key, torch.arange(len(labels), device=labels.device))  # (B, 2)
    shape = (len(labels), model.config.in_channels, model.config.input_size, model.config.input_size)
    noise = mk.philox_normal(shape, mk.fold_in(keys, START))
    guide = Guide(model, labels, guidance_scale)
    if isinstance(scheduler, tuple):
        return planned(guide, noise, scheduler, num_inference_steps, mk.fold_in(keys, STEPS))
    return scheduled(guide, noise, scheduler, num_inference_steps, mk.fold_in(key, -1))


class Guide:
    """The model at one time, with and without labels, in one batch."""

    def __init__(self, model: DiT, labels: Tensor, scale: float):
        self.model, self.scale, self.channels = model, scale, model.config.in_channels
        self.guided = scale != 1.0
        self.labels = torch.cat([labels, torch.full_like(labels, model.no_label)]) if self.guided else labels

    def __call__(self, x: Tensor, timestep: float | Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output with labels, without labels, and what the model says of the variance; (B, C, S, S) each, views."""
        x = torch.cat([x, x]) if self.guided else x
        if isinstance(timestep, Tensor):
            t = timestep.to(x.device, non_blocking=True).expand(len(x))  # (B,)
        else:
            t = torch.full((len(x),), timestep, device=x.device)
        output = self.model(x, t, self.labels)  # (B or 2 B, C or 2 C, S, S)
        cond, uncond = output.chunk(2) if self.guided else (output, None)
        variance = cond[:, self.channels :] if cond.shape[1] > self.channels else None
        return cond[:, : self.channels], None if uncond is None else uncond[:, : self.channels], variance


def planned(guide: Guide, noise: Tensor, scheduler: Named, num_inference_steps: int, keys: Tensor) -> Tensor:
    """The run of a named scheduler as a table of coefficients, one operator a step."""
    name, config = scheduler
    plan = mk.schedulers.plan(name, config, num_inference_steps=num_inference_steps)
    if plan.clamp is not None and plan.clamp[0] != -plan.clamp[1]:
        raise ValueError(f"{name} clamps to {plan.clamp}, which is not symmetric")
    rows = [
        [*row, [*ends, *[0.0] * len(plan.inputs)]] if ends else row
        for row, ends in zip(plan.rows, plan.log_variance or [()] * len(plan.rows), strict=True)
    ]
    coefficients = torch.tensor(rows, dtype=torch.float64)  # (steps, 1 + outputs, inputs + 2), a row more with a learned variance
    used = [[j for j, input in enumerate(plan.inputs) if input in PAIR or any(line[j] for line in row)] for row in plan.rows]
    if max(map(len, used)) > AT_MOST:
        raise ValueError(f"{name} has steps of more than {AT_MOST} inputs: give it as an object, mk.schedulers.{name}(**config)")
    x, history = noise * plan.init_noise_sigma, dict[str, Tensor]()
    for i, (t, scale) in enumerate(zip(plan.timesteps, plan.scale_model_input, strict=True)):
        output, uncond, variance = guide(x if scale == 1 else x * scale, t)
        there = {"sample": x, "model_output": output} | history
        inputs = [plan.inputs[j] for j in used[i]]
        made = mk.scheduler_step(
            [there[name] for name in inputs],
            coefficients[:, :, [*used[i], -2, -1]],
            i,
            noise=keys if plan.draws_noise[i] else None,
            clamp=plan.clamp[1] if plan.clamp else None,
            threshold=plan.threshold,
            variance=required(variance, config["variance_type"]) if plan.log_variance else None,
            uncond=uncond,
            guided=inputs.index("model_output"),
            guidance_scale=guide.scale,
        )
        there |= dict(zip(plan.outputs, made, strict=True))
        history = {name: there[source] for name, source in plan.feeds_of(i).items() if source in there}
        x = there["prev_sample"]
    return x


def scheduled(guide: Guide, noise: Tensor, scheduler: Any, num_inference_steps: int, key: Tensor) -> Tensor:
    """The run of an object with the interface of diffusers' schedulers."""
    scheduler.set_timesteps(num_inference_steps)
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        seed = int(mk.philox_integers((1,), key).item())  # the one wait for the device
        options["generator"] = torch.Generator(noise.device).manual_seed(seed)
    reads_variance = getattr(getattr(scheduler, "config", None), "variance_type", None) in LEARNED
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output, uncond, variance = guide(scaled, t)
        output = output if uncond is None else mk.guidance(output, uncond, guide.scale)
        if reads_variance:
            output = torch.cat([output, required(variance, scheduler.config.variance_type)], dim=1)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


def required(variance: Tensor | None, variance_type: str) -> Tensor:
    """What the model says of the variance, for a scheduler that reads it."""
    if variance is None:
        raise ValueError(f"scheduler must not read a variance, which the model does not say, got variance_type={variance_type!r}")
    return variance
