"""A plan carried out in plain PyTorch, fp64: the format of `Plan` once more, independent of the operator that applies it."""

import math

import torch


def image(step, shape, speed=0.9):
    """A tensor of known numbers between -1.7 and 1.7 that differs from step to step; sines, so that no generator decides."""
    count = math.prod(shape)
    numbers = [math.sin(speed * (j + 1) + 1.7 * step) + 0.7 * math.cos(2.3 * j - step) for j in range(count)]
    return torch.tensor(numbers, dtype=torch.float64).view(shape)


def model(step, scaled, channels):
    """What stands for a network: of the input a bounded function, of the step another image."""
    output = image(step, scaled.shape, speed=1.3) + 0.3 * torch.tanh(scaled)
    return output if channels == scaled.shape[1] else torch.cat([output, torch.tanh(image(step, scaled.shape, speed=0.4))], dim=1)


def combined(coefficients, tensors):
    terms = [c * tensor for c, tensor in zip(coefficients, tensors, strict=True) if c != 0]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(tensors[0])


def clipped(plan, derived):
    if plan.clamp is not None:
        return derived.clamp(*plan.clamp)
    if plan.threshold is not None:
        ratio, greatest = plan.threshold
        s = torch.quantile(derived.flatten(1).abs(), ratio, dim=1).clamp(1, greatest).view(-1, *[1] * (derived.ndim - 1))
        return derived.clamp(-s, s) / s
    return derived


def step(plan, k, inputs, noise, variance=None):
    """The outputs of row k by name. inputs: name -> tensor; history that does not exist yet may be missing."""
    row, sample = plan.rows[k], inputs["sample"]
    tensors = [inputs.get(name, torch.full_like(sample, math.nan)) for name in plan.inputs]
    derived = clipped(plan, combined(row[0], [*tensors, torch.full_like(sample, math.nan), noise]))
    if variance is not None:
        least, greatest = plan.log_variance[k]
        share = (variance + 1) / 2
        noise = noise * torch.exp(0.5 * (share * greatest + (1 - share) * least))
    outputs = [combined(line, [*tensors, derived, noise]) for line in row[1:]]
    return dict(zip(plan.outputs, outputs, strict=True))


def trajectory(plan, shape, channels, apply=step):
    """Per step the outputs by name, of a run whose model is `model` and whose noise is `image`. `apply` carries out a row."""
    sample, history, steps = image(99, shape) * plan.init_noise_sigma, {}, []
    for k in range(len(plan.rows)):
        output = model(k, sample * plan.scale_model_input[k], channels)
        variance = None
        if plan.log_variance is not None:
            output, variance = output.chunk(2, dim=1)
        if plan.channels is not None:
            output = output[:, : plan.channels]
        inputs = {"sample": sample, "model_output": output} | history
        noise = image(k, shape, speed=2.1)
        outputs = apply(plan, k, inputs, noise, variance)
        everything = inputs | outputs | {"noise": noise}
        history = {name: everything[source] for name, source in plan.feeds_of(k).items() if source in everything}
        sample = outputs["prev_sample"]
        steps.append(outputs)
    return steps
