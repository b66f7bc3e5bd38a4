"""mk.patch and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from mmgen_kernels.checks import check_choice
from mmgen_kernels.patching import diffusers_codes, diffusers_schedulers, gaussian_diffusion
from mmgen_kernels.patching.diffusers_schedulers import Method, schedulers_in
from mmgen_kernels.patching.gaussian_diffusion import diffusions_in
from mmgen_kernels.patching.rule import Forward, Rule
from mmgen_kernels.patching.verification import differences
from mmgen_kernels.schedule.schedulers.noise import NOISES


@dataclass(frozen=True)
class Replaced:
    """A module, scheduler or diffusion that runs our code now."""

    name: str  # qualified name within the patched object
    kind: str  # its class
    by: str
    falls_back_when: tuple[str, ...]
    verified: bool


@dataclass(frozen=True)
class Kept:
    """What a rule knows and what stays as it is: a module, a scheduler, a diffusion or one of its methods."""

    name: str
    kind: str
    reasons: tuple[str, ...]
    already_patched: bool = False


class RulesOfObjects(Protocol):
    """What is asked of a module, or an object, that knows a kind of scheduler or diffusion."""

    @property
    def BY(self) -> str: ...

    @property
    def FALLS_BACK_WHEN(self) -> tuple[str, ...]: ...

    def considered(self, object: Any, verify: bool, noise: str, /) -> tuple[list[str], dict[str, Method], dict[str, list[str]]]:
        """Reasons to leave it alone, what replaces which method, and the methods that are left, with reasons."""


class Handle:
    """What was replaced and what was not; takes it back. A context manager that reverts on exit."""

    def __init__(self) -> None:
        self.replaced: list[Replaced] = []
        self.kept: list[Kept] = []
        self._patched: list[tuple[str, nn.Module, Forward]] = []
        self._methods: list[tuple[str, Any, str, Any]] = []  # of objects: name, object, method, what is in its place
        self._reverted = False

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()

    def revert(self) -> None:
        """Gives every module its own forward back. Doing it twice does nothing.

        Raises:
            RuntimeError: if somebody replaced a forward after `patch` did; all others are reverted first.
        """
        self._reverted = True
        stuck = []
        for name, module, forward in self._patched:
            found = vars(module).get("forward")
            if found is forward:
                del module.forward
            elif found is not None and not isinstance(found, Forward):
                stuck.append((name, module, forward))
        self._patched = stuck
        told = [f"{name} by {vars(module)['forward']!r}" for name, module, _ in stuck]
        for name, scheduler, method, ours in list(self._methods):
            if vars(scheduler).get(method) is ours:
                delattr(scheduler, method)
            elif method in vars(scheduler):
                told.append(f"{name}.{method} by {vars(scheduler)[method]!r}")
                continue
            self._methods.remove((name, scheduler, method, ours))
        if told:
            raise RuntimeError(f"cannot revert what was replaced again since: {', '.join(told)}")

    def report(self) -> str:
        """What was replaced by what, what was not and why, and which calls the stock code still serves."""
        state = ", reverted since" if self._reverted else ""
        lines = [f"mk.patch: {len(self.replaced)} replaced{state}, {len(self.kept)} kept"]
        for r in self.replaced:
            lines.append(f"  replaced {r.name} ({r.kind}) by {r.by}, {'verified' if r.verified else 'not verified'}")
        for k in self.kept:
            lines.append(f"  kept     {k.name} ({k.kind}): {'; '.join(k.reasons)}")
        calls = {(r.kind, r.falls_back_when): None for r in self.replaced if r.falls_back_when}
        for kind, when in calls:
            lines.append(f"  {kind} falls back to stock when: {'; '.join(when)}")
        if not self.replaced and not self.kept:
            lines.append("  no module or scheduler here is known to any rule")
        return "\n".join(lines)

    __str__ = report


def patch_with(
    rules: Iterable[Rule],
    object: Any,
    *,
    families: str | Iterable[str] | None,
    verify: bool,
    strict: bool,
    noise: str = "torch",
) -> Handle:
    """`patch`, with the rules as an argument."""
    rules = list(rules)
    check_choice("noise", noise, NOISES)
    wanted = _families(families, sorted({rule.family for rule in rules} | {"schedule"}))
    for name, flag in (("verify", verify), ("strict", strict)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    rules = [rule for rule in rules if rule.family in wanted]
    modules = list(_modules("", object, set()))
    objects: list[tuple[str, Any, RulesOfObjects]] = []
    if "schedule" in wanted:
        objects += [(name, scheduler, diffusers_schedulers) for name, scheduler in schedulers_in(object)]
        for of_codes in diffusers_codes.RULES:
            objects += [(name, scheduler, of_codes) for name, scheduler in schedulers_in(object, (of_codes.name,))]
        objects += [(name, diffusion, gaussian_diffusion) for name, diffusion in diffusions_in(object)]
    if not modules and not objects:
        raise TypeError(f"object must be an nn.Module or a scheduler, or hold some, got {type(object).__name__} without any")
    handle = Handle()
    below_kept: set[int] = set()
    try:
        for name, module in modules:
            if id(module) in below_kept:
                continue
            rule = next((rule for rule in rules if rule.recognises(module)), None)
            if rule is None:
                continue
            adopted = _consider(handle, rule, name or type(module).__name__, module, verify)
            if rule.encloses and not adopted:
                below_kept |= {id(child) for child in module.modules()}
        for name, found, rules_of_objects in objects:
            _consider_object(handle, rules_of_objects, name, found, verify, noise)
        if strict:
            _demand(handle)
    except BaseException:
        handle.revert()
        raise
    return handle


def _consider(handle: Handle, rule: Rule, name: str, module: nn.Module, verify: bool) -> bool:
    """Patches the module if nothing speaks against it, and books what was done."""
    kind = type(module).__name__
    there = vars(module).get("forward")
    if isinstance(there, Forward):
        handle.kept.append(Kept(name, kind, ("already patched, and left as it is",), already_patched=True))
        return False
    reasons = rule.reasons_against(module)
    if there is not None and not rule.encloses:
        reasons = [f"its forward was already replaced on the instance, by {type(there).__name__}", *reasons]
    if rule.encloses and not reasons:
        return True
    if not reasons and verify:
        reasons = differences(rule, module)
    if reasons:
        handle.kept.append(Kept(name, kind, tuple(reasons)))
        return False
    forward = rule.forward(module)
    module.forward = forward
    handle._patched.append((name, module, forward))
    handle.replaced.append(Replaced(name, kind, rule.by, rule.falls_back_when, verify))
    return True


def _consider_object(handle: Handle, rules: RulesOfObjects, name: str, object: Any, verify: bool, noise: str) -> None:
    """As `_consider`, of an object whose methods are replaced one by one."""
    kind = type(object).__name__
    if any(isinstance(value, Method) for value in vars(object).values()):
        handle.kept.append(Kept(name, kind, ("already patched, and left as it is",), already_patched=True))
        return
    reasons, methods, left = rules.considered(object, verify, noise)
    if reasons:
        handle.kept.append(Kept(name, kind, tuple(reasons)))
    for method, ours in methods.items():
        setattr(object, method, ours)
        handle._methods.append((name, object, method, ours))
    if methods:
        handle.replaced.append(Replaced(name, kind, rules.BY, rules.FALLS_BACK_WHEN, verify))
    for method, reasons in left.items():
        handle.kept.append(Kept(f"{name}.{method}", kind, tuple(reasons)))


def _demand(handle: Handle) -> None:
    stock = [kept for kept in handle.kept if not kept.already_patched]
    if stock or not (handle.replaced or handle.kept):
        what = "kept as they were" if stock else "nothing to replace"
        raise RuntimeError(f"strict=True, and {what}:\n{handle.report()}")


def _families(families: str | Iterable[str] | None, known: list[str]) -> list[str]:
    if families is None:
        return known
    wanted = [families] if isinstance(families, str) else list(families)
    for family in wanted:
        if family not in known:
            raise ValueError(f"families must be among {', '.join(known)}, got {family!r}")
    return wanted


def _modules(name: str, object: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Every module in the object once, parents before children: of modules, containers, and attributes such as a pipeline's."""
    if id(object) in seen:
        return
    if isinstance(object, nn.Module):
        for path, module in object.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield ".".join(part for part in (name, path) if part), module
        return
    seen.add(id(object))
    if isinstance(object, Mapping):
        children = [(str(key), value) for key, value in object.items()]
    elif isinstance(object, (list, tuple)):
        children = [(str(i), value) for i, value in enumerate(object)]
    elif not name:  # attributes of the object itself only: what hangs further down is not its own
        children = [(key, value) for key, value in getattr(object, "__dict__", {}).items() if _may_hold(value)]
    else:
        return
    for key, value in children:
        yield from _modules(f"{name}.{key}" if name else key, value, seen)


def _may_hold(value: Any) -> bool:
    return isinstance(value, (nn.Module, Mapping, list, tuple))
