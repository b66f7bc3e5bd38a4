"""Does a patched module do what the stock one does? Both are run on copies, and nothing of the module itself is touched.

A run is two training steps and one call in eval mode, on a few random rows: every output, the gradients of inputs and
parameters, and every buffer after each step are compared, once per process and kind of module.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmgen_kernels.patching.rule import Rule

DRAWS = 4  # of inputs, where a near tie explains that indices differ
INPUTS = 1000  # seeds of inputs are that much above those of values that `prepare` draws
STEPS = ("training step 1", "training step 2", "eval")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KEYED_BY_HOOK = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
# Relative to the value, and to the largest value of its tensor. fp32: sums over 32 rows in another order differ by less than
# 32 * 2^-24 = 2e-6 of the largest term, and the second step starts from there. fp64 has the same, as libraries look up
# in fp32 whatever they are given. bf16 and fp16: a few units in the last place.
TOLERANCES = {torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
FP32_TOLERANCE = (1e-4, 1e-5)
# Two distances within this many roundings of the larger square may be told apart either way by the stock arithmetic.
NEAR_TIE_ROUNDINGS = 64

_verified: set[Any] = set()  # kinds of modules


def differences(rule: Rule, module: nn.Module) -> list[str]:
    """What the module by `rule` does otherwise than the stock module; empty if nothing.

    That there is nothing is remembered per kind of module. A difference is not: it may come from the values of this one.
    """
    key = kind(rule, module)
    found = [] if key in _verified else _differences(rule, module)
    if not found:
        _verified.add(key)
    return found


def kind(rule: Rule, module: nn.Module) -> Any:
    """What modules that are verified together share: class, plain options, and shape, dtype, device of all tensors.

    Of tensors with one bool, such as whether k-means has run, the value counts too.
    """
    parts: list[Any] = [type(rule)]
    for name, child in module.named_modules():
        options = {k: v if _is_plain(v) else type(v) for k, v in vars(child).items() if k != "training" and k not in KEYED_BY_HOOK}
        parts += [name, type(child), tuple(sorted(options.items(), key=lambda item: item[0]))]
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        flag = bool(tensor) if tensor.dtype == torch.bool and tensor.numel() == 1 and not tensor.is_meta else None
        parts.append((name, tuple(tensor.shape), tensor.dtype, str(tensor.device), tensor.requires_grad, flag))
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _differences(rule: Rule, module: nn.Module) -> list[str]:
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    if any(t.is_meta for t in tensors):
        return ["verification needs values, and the module is on the meta device"]
    found: list[str] = []
    with undisturbed(device):
        for seed in range(DRAWS):
            try:
                stock = copied(module)
                rule.prepare(stock, drawing(device, dtype, seed))
                ours = copied(stock)
                vars(ours)["forward"] = rule.trial(ours)
                sides = [run(rule, side, device, dtype, seed) for side in (stock, ours)]
                found, near_ties = lockstep(sides[0], sides[1], rule, rule.magnification(module))
            except Exception as error:
                return [f"verification fails: {type(error).__name__}: {error}"]
            if not found or not near_ties:
                return found
    return [f"{found[0]} (in {DRAWS} draws of inputs, all with near ties)", *found[1:]]


# -- one run ----------------------------------------------------------------------------------------------------------


class Aftermath(NamedTuple):
    """What one call left behind."""

    at: str
    error: Exception | None
    left: dict[str, Any]  # by name; not cloned


def lockstep(
    stock: Iterator[Aftermath], ours: Iterator[Aftermath], rule: Rule, magnification: float
) -> tuple[list[str], bool]:
    """What differs in the first call that differs, and whether a near tie may be why. One call at a time is kept."""
    lookups, served = Lookups(), False
    for expected in stock:
        with lookups if rule.family == "vq" else contextlib.nullcontext():  # a process's first dispatch mode imports Dynamo: 2 s
            results = next(ours)
        if type(expected.error) is not type(results.error):
            return [f"{expected.at}: raises {results.error!r}, stock {expected.error!r}"], False
        served |= expected.error is None
        if not served:  # later calls may be refused by both: stock does not take masks with heads
            return [f"verification: the stock module raises {expected.error!r}"], False
        if found := compare(expected.left, results.left, magnification, rule.vanishing):
            return [f"{expected.at}: {found[0]}", *found[1:]], lookups.near_ties()
        lookups.seen.clear()
    return [], False


def drawing(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """draw(*shape), normal numbers."""
    own = torch.Generator().manual_seed(seed)  # the global one belongs to the module
    return lambda *shape: torch.randn(shape, generator=own, dtype=torch.float32, device="cpu").to(device, dtype)


def run(rule: Rule, module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Aftermath]:
    """Two training steps and one step in eval mode; after each call, everything that it left behind."""
    draw = drawing(device, dtype, INPUTS + seed)
    for step in STEPS:
        module.train(step != STEPS[-1])
        for number, (args, kwargs) in enumerate(rule.calls(module, draw)):
            seed_global(device, seed)
            args = tuple(a.detach().requires_grad_() if a.is_floating_point() else a for a in args)
            outputs, refused, left = [], None, {}
            try:
                outputs = tree_flatten(module(*args, **kwargs))[0]
            except Exception as error:
                refused = error
            total = torch.zeros((), dtype=torch.float64, device=device)
            for i, output in enumerate(outputs):
                left[f"output {i}"] = output.detach() if isinstance(output, Tensor) else output
                if isinstance(output, Tensor) and output.is_floating_point():
                    left[f"output {i} requires a gradient"] = output.requires_grad
                    total = total + (output.double() * draw(*output.shape).double()).sum()
            if total.requires_grad:
                total.backward()
            for name, tensor in [*((f"input {i}", a) for i, a in enumerate(args)), *module.named_parameters()]:
                left[f"gradient of {name}"] = tensor.grad
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                left[name] = tensor.detach()
            left |= {f"state of random generator {i}": g.get_state() for i, g in enumerate(_generators(device))}
            yield Aftermath(f"{step}, call {number + 1}", refused, left)
            module.zero_grad(set_to_none=True)


def compare(
    expected: dict[str, Any], results: dict[str, Any], magnification: float = 1.0, vanishing: tuple[str, ...] = ()
) -> list[str]:
    """What differs, the first few in the order of the run. Gradients that vanish are compared by the size of the others."""
    gradients = {name: value for name, value in expected.items() if name.startswith("gradient of") and isinstance(value, Tensor)}
    for name in (f"gradient of {parameter}" for parameter in vanishing):
        if name in gradients and isinstance(results.get(name), Tensor):
            largest = max(float(reach(value)) for value in gradients.values())
            expected, results = ({**of, name: of[name] + largest} for of in (expected, results))
    found = [f"{name} is missing" for name in expected if name not in results]
    found += [f"{name} is new" for name in results if name not in expected]
    for name in expected:
        if name in results and (told := difference(expected[name], results[name], magnification)):
            found.append(f"{name} {told}")
    return found if len(found) <= 3 else [*found[:3], f"and {len(found) - 3} more"]


def difference(expected: Any, found: Any, magnification: float = 1.0) -> str | None:
    """How `found` differs from `expected`; None if it does not."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        told = [f"a tensor {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v) for v in (found, expected)]
        return None if type(expected) is type(found) and expected == found else f"is {told[0]}, stock {told[1]}"
    for what in ("shape", "dtype", "device"):
        if getattr(expected, what) != getattr(found, what):
            return f"has {what} {getattr(found, what)}, stock {getattr(expected, what)}"
    if torch.equal(expected, found):
        return None
    if not expected.is_floating_point():
        different = int((expected != found).sum())
        return f"differs at {different} of {expected.numel()} places"
    relative, of_largest = (magnification * t for t in TOLERANCES.get(expected.dtype, FP32_TOLERANCE))
    wide = torch.promote_types(expected.dtype, torch.float32)
    a, b = expected.to(wide), found.to(wide)
    if a.numel() and reach(a - b) <= of_largest * reach(a) < torch.inf:
        return None  # the common case in three passes: the rest takes ten, a second for the gradients of a block of DiT-XL
    finite = a.isfinite()
    largest = float(a[finite].abs().max()) if finite.any() else 0.0
    same = torch.isclose(b, a, rtol=relative, atol=of_largest * largest, equal_nan=True)
    if same.all():
        return None
    return f"differs by up to {float((a - b)[~same].abs().max()):.3g} at {int((~same).sum())} places, largest value {largest:.3g}"


def reach(values: Tensor) -> Tensor:
    """The largest magnitude, NaN where there is one."""
    least, most = values.aminmax()
    return torch.maximum(-least, most)


class Lookups(TorchDispatchMode):
    """Watches the lookups that our operators make, to tell a near tie from a mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, str]] = []  # x, codebook, metric

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.mmgen_kernels.nearest_code, torch.ops.mmgen_kernels.vector_quantize):
            arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self.seen.append((arguments["x"].detach().clone(), arguments["codebook"].detach().clone(), arguments["metric"]))
        return func(*args, **(kwargs or {}))

    def near_ties(self) -> bool:
        """Whether for some row the two best codes are closer than the stock arithmetic can tell."""
        for x, codebook, metric in self.seen:
            codes = codebook.double() if codebook.dim() == 3 else codebook.double()[None]  # (H, K, D)
            if codes.shape[1] < 2:
                continue
            rows = x.double().reshape(len(codes), -1, x.shape[-1])  # (H, N, D)
            scores = rows @ codes.mT  # (H, N, K)
            sizes = rows.square().sum(-1, keepdim=True) + codes.square().sum(-1)[:, None]
            best = (2 * scores - sizes if metric == "l2" else scores).topk(2)
            rounding = NEAR_TIE_ROUNDINGS * torch.finfo(torch.promote_types(x.dtype, codebook.dtype)).eps
            gap = best.values[..., 0] - best.values[..., 1]
            if (gap <= rounding * sizes.gather(-1, best.indices).amax(-1)).any():
                return True
        return False


# -- leaving no trace -------------------------------------------------------------------------------------------------


def copied(module: nn.Module) -> nn.Module:
    """A deep copy without hooks, which are the user's to call, and without history."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        memo |= {id(vars(child)[name]): OrderedDict() for name in (*HOOKS, *KEYED_BY_HOOK) if name in vars(child)}
        for buffer in child._buffers.values():
            if buffer is not None and not buffer.is_leaf:  # deepcopy refuses these
                memo[id(buffer)] = buffer.detach().clone()
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast and TF32 off (stock would pick other codes), and afterwards all as it was, generators too."""
    generators, products = _generators(device), (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before, precisions = [g.get_state() for g in generators], [p.fp32_precision for p in products]
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # what stock warns of it will say again when the user calls it
            yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        for product, precision in zip(products, precisions, strict=True):
            product.fp32_precision = precision


def seed_global(device: torch.device, seed: int) -> None:
    """torch.manual_seed would also seed devices that the module is not on."""
    for generator in _generators(device):
        generator.manual_seed(seed)


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]
