"""Times a module inside a training step, forward and backward, without touching the module or the step.

Identity functions at the module's input and output read the clock when the forward passes them and again when the
backward does. Autograd runs nodes in the reverse order of their making, so that everything between the two readings of
the backward belongs to the module, its parameters' gradients included.
"""

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class _Reading(torch.autograd.Function):
    """Identity on tensors; reads the clock in the backward."""

    @staticmethod
    def forward(ctx, stopwatch, *tensors):
        ctx.stopwatch = stopwatch
        outputs = tuple(t.view_as(t) for t in tensors)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        ctx.stopwatch.read_clock()
        return None, *grads


class Stopwatch:
    """`Stopwatch(module, device)` listens to every step of `module` in which gradients are recorded."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.cuda, self.device = device.type == "cuda", device
        self.readings: list = []  # four per step: forward in, forward out, backward in, backward out
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def read_clock(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.readings.append(event)
        else:
            self.readings.append(time.perf_counter())

    def _enter(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, ...] | None:
        if not (torch.is_grad_enabled() and args[0].requires_grad):
            return None
        marked = _Reading.apply(self, *args)
        self.read_clock()
        return marked

    def _leave(self, module: nn.Module, args: tuple[Tensor], output: Iterable[Tensor]):
        if not (torch.is_grad_enabled() and args[0].requires_grad):
            return None
        self.read_clock()
        return type(output)(*_Reading.apply(self, *output))

    def milliseconds(self) -> list[float]:
        """Forward plus backward of every step since the last call. On CUDA it waits for the last of them."""
        readings, self.readings = self.readings, []
        if self.cuda and readings:
            readings[-1].synchronize()
        steps = zip(*[iter(readings)] * 4, strict=True)
        if self.cuda:
            return [a.elapsed_time(b) + c.elapsed_time(d) for a, b, c, d in steps]
        return [1e3 * ((b - a) + (d - c)) for a, b, c, d in steps]
