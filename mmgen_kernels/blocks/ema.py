"""The moving average of a model's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmgen_kernels.checks import check_number

WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """Moves the parameters of `ema_model` towards those of `model`: ``ema += (1 - decay) * (parameter - ema)``.

    All parameters of a device and dtype in one call of torch's multi-tensor kernels, in place; on CUDA a few launches and no wait
    for the GPU. The same call as in the scripts of DiT, SiT, REPA and LlamaGen, whose ``ema * decay + parameter * (1 - decay)``
    rounds twice more and moves even what is equal already. Buffers are left alone, as there.

    Args:
        ema_model: its parameters are written; they need not have the dtype of the model's.
        model: bare, or wrapped by DistributedDataParallel or torch.compile.
        decay: 0 copies the model, 1 changes nothing.

    Raises:
        TypeError, ValueError: the models have not the same parameters, or decay is not in 0..1; then nothing is written.

    NaN: a NaN in a parameter of `model` makes the same element of `ema_model` NaN, for good.
    """
    for name, module in (("ema_model", ema_model), ("model", model)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a module, got {type(module).__name__}")
    check_number("decay", decay)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in 0..1, got {decay}")
    averages, parameters = (dict(bare(m)) for m in (ema_model, model))
    if different := sorted(averages.keys() ^ parameters.keys()):
        raise ValueError(f"model must have the parameters of ema_model; these are not in both: {', '.join(different[:5])}")
    groups: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for name, average in averages.items():
        parameter = parameters[name].detach()
        if parameter.shape != average.shape:
            expected = f"the shape {tuple(average.shape)} that it has in ema_model"
            raise ValueError(f"{name} must have {expected}, got {tuple(parameter.shape)}")
        if parameter.device != average.device:
            raise ValueError(f"{name} must be on ema_model's device {average.device}, got {parameter.device}")
        of_average, of_parameter = groups.setdefault((average.device, average.dtype), ([], []))
        of_average.append(average.detach())
        of_parameter.append(parameter.to(average.dtype))
    for of_average, of_parameter in groups.values():
        torch._foreach_lerp_(of_average, of_parameter, 1 - decay)


def bare(model: nn.Module):
    """Parameters by the names that they have without wrappers."""
    for name, parameter in model.named_parameters():
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        yield name, parameter
