"""What the drop-in must know of a library: which modules it replaces, why not others, and by what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

ROWS = 32  # of the calls of verification: the stock module holds its N x K matrix there too, 32 MiB for 2^18 codes in fp32
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one call of a module


class Forward:
    """The forward that a rule puts on one instance, as an instance attribute; the class keeps its own.

    It holds the module and nothing else that lasts. So it is copied and pickled with the module and then serves the copy,
    which a closure over the original would not.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """What the class itself would do."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable:
        """`inspect.signature(module.forward)` stays what it was."""
        return type(self.module).forward.__get__(self.module)

    @property
    def __code__(self) -> Any:
        """torch.export asks every forward where it is written."""
        return type(self).__call__.__code__


class Rule:
    """One kind of module of one library. A rule never imports the library: it recognises what is there."""

    family: str
    by: str  # what takes the place of the stock code
    falls_back_when: tuple[str, ...] = ()  # calls that the stock code serves
    vanishing: tuple[str, ...] = ()  # parameters whose gradient is 0 but for roundings
    encloses = False  # replaces nothing itself; its reasons keep everything below it stock

    def recognises(self, module: nn.Module) -> bool:
        """Whether this rule is the one to ask."""
        raise NotImplementedError

    def reasons_against(self, module: nn.Module) -> list[str]:
        """Why this instance is not served; empty if it is."""
        raise NotImplementedError

    def forward(self, module: nn.Module) -> Forward:
        """What replaces the forward of this instance."""
        raise NotImplementedError

    def trial(self, module: nn.Module) -> Forward:
        """What verification compares with stock: that forward, or how another module's reads what this one holds."""
        return self.forward(module)

    def calls(self, module: nn.Module, draw: Callable[..., Tensor]) -> Iterator[Call]:
        """Calls by which verification compares; `draw(*shape)` gives normal numbers of the module's dtype and device."""
        raise NotImplementedError

    def magnification(self, module: nn.Module) -> float:
        """How many times the rounding of stock's own distances shows in its results."""
        return 1.0

    def prepare(self, module: nn.Module, draw: Callable[..., Tensor]) -> None:
        """Makes a copy fit for verification: it speaks to no other process, and its codes lie as far apart as the inputs do.

        A new codebook is a heap of tiny codes to which every input is equally far; stock rounds and takes any of them.
        """
        raise NotImplementedError


def descends_from(module: nn.Module, package: str, name: str) -> type | None:
    """The class `name` of `package` in the module's ancestry, however the package arranges its files."""
    for ancestor in type(module).__mro__:
        if ancestor.__name__ == name and ancestor.__module__.split(".")[0] == package:
            return ancestor
    return None


def overridden(module: nn.Module, base: type, *methods: str) -> list[str]:
    """Reasons: methods that a subclass has replaced, so that the rule no longer knows what they do."""
    return [
        f"{type(module).__name__} overrides {base.__name__}.{method}"
        for method in methods
        if getattr(type(module), method, None) is not getattr(base, method, None)
    ]


def has_hooks(module: nn.Module) -> bool:
    """Whether someone listens to this module: then it must be called as ever."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def graph_of(output: Tensor, tensor: Tensor) -> Tensor:
    """An output of an operator that in stock code depends on `tensor` alone: if that wants no gradient, neither does this."""
    return output if tensor.requires_grad else output.detach()


def embedding_reasons(embedding: nn.Module, num_codes: int, dim: int) -> list[str]:
    """Why a codebook kept in an `nn.Embedding` cannot be read as a plain matrix."""
    if type(embedding) is not nn.Embedding:
        return [f"embedding is a {type(embedding).__name__}, not an nn.Embedding"]
    reasons = []
    if tuple(embedding.weight.shape) != (num_codes, dim):
        reasons.append(f"embedding.weight has shape {tuple(embedding.weight.shape)}, expected {(num_codes, dim)}")
    for option in ("max_norm", "padding_idx", "sparse", "scale_grad_by_freq"):
        if getattr(embedding, option) not in (None, False):
            reasons.append(f"embedding has {option}={getattr(embedding, option)}")
    return reasons


def parameters_of_forward(module: nn.Module) -> list[str]:
    """The names of the arguments that the class's forward takes."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
