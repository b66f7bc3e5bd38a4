"""What a step of a DiT script launches and waits for, stock and with `mk.patch`: `python -m benchmarks.launches`.

Counted on torch's meta device, which has no values: nothing runs, and whatever would read one back raises. What is dispatched to it
is a launch, but for views and allocations. An operator of ours counts as what its Triton launcher launches, kernels and torch's own
operators; one without a launcher counts as one. Large: a tensor as large as the latents is read or written; small: the rest. A copy
from the host's pageable memory is a wait. Writes the table of docs/drop-in.md; `--check` fails if it is another one.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import tables
from benchmarks.peers import dit_script, openai_diffusion

PAGE = Path(__file__).resolve().parents[1] / "docs" / "drop-in.md"
BLOCK = re.compile(r"(<!-- launches -->\n).*?(<!-- /launches -->)", re.DOTALL)
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_LAUNCH = (*ALLOCATIONS, "detach", "_unsafe_view", "lift_fresh")
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
DEVICE = torch.device("meta")
SAMPLES, DIT_S_2 = 32, (384, 12, 6)  # channels, blocks, heads


@dataclass
class Count:
    large: int = 0
    small: int = 0
    waits: int = 0


class Launches(TorchDispatchMode):
    """Counts what is dispatched to the device while it is on. `names` has how often each operator was."""

    def __init__(self, large: int):
        super().__init__()
        self.count, self.names, self.least = Count(), Counter[str](), large

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mmgen_kernels":
            return self.ours(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        self.book(func.overloadpacket.__name__, func, (args, kwargs), out)
        return out

    def ours(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator by what it is made of: others, or the kernels of its launcher."""
        from mmgen_kernels.library import OPERATORS

        operator = OPERATORS[func.overloadpacket.__name__]
        left = [a for a in func._schema.arguments[len(args) :] if a.name not in kwargs]  # the dispatcher leaves defaults out
        kwargs = kwargs | {a.name: a.default_value for a in left}
        if operator.parts:
            with self:
                return operator.reference(*args, **kwargs)
        if "triton" not in operator.launchers:
            self.add(operator.name, args, out := func(*args, **kwargs))
            return out
        module, name = operator.launchers["triton"].split(":")
        with self, self.kernels(operator.name):
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

    @contextmanager
    def kernels(self, name: str) -> Iterator[None]:
        """In which Triton's kernels are counted, and do not run."""
        from triton.runtime.jit import JITFunction

        def launch(*args: Any, **kwargs: Any) -> None:
            self.add(name, args, kwargs)

        with mock.patch.object(JITFunction, "__getitem__", lambda kernel, grid: launch):
            yield

    def book(self, name: str, func: Any, given: Any, out: Any) -> None:
        tensors = [t for t in tree_leaves((given, out)) if isinstance(t, Tensor)]
        devices = {t.device for t in tensors}
        if DEVICE not in devices:
            return
        if name in READS or (name in ("_to_copy", "copy_") and len(devices) > 1):
            self.names[name] += 1
            self.count.waits += 1
        elif name not in NO_LAUNCH and not is_view(func):
            self.add(name, given, out)

    def add(self, name: str, *given: Any) -> None:
        self.names[name] += 1
        if max((t.numel() for t in tree_leaves(given) if isinstance(t, Tensor)), default=0) >= self.least:
            self.count.large += 1
        else:
            self.count.small += 1


def is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class AsOnGPU(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` copies from the host, below what is dispatched; attention is one kernel."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device == DEVICE:
            self.launches.names["tensor"] += 1
            self.launches.count.waits += 1
        return out


def counted(call: Callable[[], object], large: int) -> Launches:
    """Of the second call: the first one sends tables and makes the optimizer's state."""
    call()
    launches = Launches(large)
    with launches, AsOnGPU(launches):
        call()
    return launches


# -- the script ---------------------------------------------------------------------------------------------------------


def script_diffusion(respacing: str = "") -> Any:
    """What DiT's scripts make: 1000 steps, noise and the range of variances learned."""
    kept = range(1000) if not respacing else range(0, 1000, 1000 // int(respacing))
    return openai_diffusion.SpacedDiffusion(
        use_timesteps=kept,
        betas=np.linspace(1e-4, 0.02, 1000),
        model_mean_type=openai_diffusion.ModelMeanType.EPSILON,
        model_var_type=openai_diffusion.ModelVarType.LEARNED_RANGE,
        loss_type=openai_diffusion.LossType.MSE,
    )


@dataclass
class Script:
    """The parts of a script that the rules may change."""

    model: nn.Module
    diffusion: Any
    update_ema: Callable[..., None]


def script(patched: bool, model: nn.Module, respacing: str = "") -> Script:
    found = Script(model, script_diffusion(respacing), dit_script.update_ema)
    if patched:
        import mmgen_kernels as mk

        mk.patch([found.model, found.diffusion], strict=True, verify=False)
        found.update_ema = mk.update_ema
    return found


def calls(patched: bool, samples: int = SAMPLES, size: tuple[int, int, int] = DIT_S_2) -> dict[str, Callable[[], object]]:
    """The parts of a training step, the whole, and a step of the samplers without the model."""
    dim, depth, heads = size
    model = dit_script.LatentDiT(dim, depth, heads).to(DEVICE)
    parts = script(patched, model)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, foreach=True)
    x = torch.empty(samples, 4, 32, 32, device=DEVICE)
    y, t = (torch.zeros(samples, dtype=torch.int64, device=DEVICE) for _ in range(2))
    output = torch.empty(samples, 8, 32, 32, device=DEVICE, requires_grad=True)

    def losses() -> None:
        output.grad = None
        parts.diffusion.training_losses(lambda x, t, y: output, x, t, {"y": y})["loss"].mean().backward()

    def of_model() -> None:
        parts.model.zero_grad()
        parts.model(x, t, y).sum().backward()

    def sampled(name: str) -> Callable[[], object]:
        return lambda: getattr(parts.diffusion, name)(lambda x, t: output.detach(), x, t, clip_denoised=False)

    return {
        "losses, forward and backward": losses,
        "model, forward and backward": of_model,
        "AdamW": optimizer.step,
        "moving average": lambda: parts.update_ema(ema, model),
        "a training step": lambda: dit_script.training_step(model, ema, optimizer, parts.diffusion, parts.update_ema, x, y),
        "p_sample": sampled("p_sample"),
        "ddim_sample": sampled("ddim_sample"),
    }


def counts(samples: int = SAMPLES, size: tuple[int, int, int] = DIT_S_2) -> dict[str, tuple[Launches, Launches]]:
    """Of each part, stock and patched."""
    stock, patched = (calls(p, samples, size) for p in (False, True))
    large = samples * 4 * 32 * 32
    return {name: (counted(stock[name], large), counted(patched[name], large)) for name in stock}


def table() -> str:
    rows = []
    for name, found in counts().items():
        cells = [str(value) for kind in ("large", "small", "waits") for value in (getattr(f.count, kind) for f in found)]
        rows.append((name, *cells))
    head = ["", *(f"{kind}, {whose}" for kind in ("large", "small", "waits") for whose in ("stock", "patched"))]
    return tables.markdown(head, rows) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is another one")
    options = parser.parse_args(arguments)
    text = PAGE.read_text()
    wanted = BLOCK.sub(lambda match: f"{match[1]}{table()}{match[2]}", text)
    if options.check:
        if wanted != text:
            print(f"{PAGE.name} is stale: run python -m benchmarks.launches", file=sys.stderr)
        return int(wanted != text)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
