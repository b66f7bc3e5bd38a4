"""Which implementation runs, and the reasons why each other one does not.

Eager and compiled code ask the same function, `choose`. It looks at metadata only. An implementation that the user asked
for by name (`use_backend`, MMGEN_KERNELS_BACKEND) and that cannot serve raises with the reasons; an automatic choice may
fall back to the reference, and says so once per (operator, reason).
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmgen_kernels.library import INLINE, NAMESPACE, OPERATORS, Operator

IMPLEMENTATIONS = ("cuda", "triton", "torch", "cpp", "reference")  # in order of preference
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on CPU tensors, for tests
DEVICES = {
    "cuda": ("cuda",),
    "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
    "torch": ("cpu", "cuda"),
    "cpp": ("cpu",),
}
FAMILIES = ("vq", "modulation", "attn", "blocks", "schedule", "philox")
# Serve who asks for them, and nobody else: the interpreter and the compiler see neither races nor miscompiled code.
BY_NAME_ONLY = {
    "cuda": 'tested by g++ and compiled by nvcc, not yet on a GPU; use_backend("cuda") asks for it',
    "triton": 'tested by interpreter and compiler, not yet on a GPU; use_backend("triton") asks for it',
}
# Under torch.compile, operators that are left to Inductor, which then sees their reference, as nothing that we have beats it there:
# (operator, device) -> the figure. use_backend undoes it. On the CPU our calls in compiled code take 0.6 to 0.9 of Inductor's time
# over a training step of benchmarks/modulation.py, and 0.7 to 1.05 of it forward alone; only a vector per token, which is no
# property of an operator, takes 1.9 and 1.3 times as long. docs/modulation.md has the figures.
STEPS_ASIDE = {
    (name, "cuda"): "Inductor fuses the reference; the Triton kernel is not yet measured against it"
    for name in ("adaln", "gate_residual", "gate_residual_adaln", "qk_norm_rope")
}
TRITON_ATTENTIONS = ("descriptors", "pointers", "warp_specialized")  # how the forward on Triton loads where it can; default first
HAS_TRITON = importlib.util.find_spec("triton") is not None

_forced: dict[str | None, str] = {}  # family (None: all) -> implementation; a module global, which Dynamo can guard
triton_attention = os.environ.get("MMGEN_KERNELS_TRITON_ATTENTION", TRITON_ATTENTIONS[0])
_warned: set[tuple[str, str]] = set()
_library_error: str | None = None  # why the C++ part is not there
_cuda_error: str | None = None  # why the CUDA part is not there


def load_library() -> None:
    """Loads the C++ part. One that is there and does not load is an error of the installation, kept and shown, not hidden."""
    global _library_error, _cuda_error
    folder = Path(__file__).parent
    facts = build_facts()
    _cuda_error = load_cuda(folder, facts)
    found = sorted(folder.glob("_C.*so"))
    if not found:
        _library_error = f"not built: {facts['cause']}" if facts.get("cause") else "not built (pip install --no-build-isolation .)"
        return
    try:
        torch.ops.load_library(str(found[0]))
        for operator in OPERATORS.values():
            operator.has_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator.name}", "CPU")
    except OSError as error:
        _library_error = f"built for torch {facts.get('torch', 'unknown')}, you have {torch.__version__}: {error}"
        warnings.warn(f"mmgen_kernels: the C++ part does not load, the reference serves the CPU: {_library_error}", stacklevel=2)


def load_cuda(folder: Path, facts: dict) -> str | None:
    """Loads the CUDA part where torch has CUDA; returns why it is not there, or None."""
    found = sorted(folder.glob("_C_cuda.*so"))
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not found:
        return f"not built: {facts.get('cuda', 'pip install --no-build-isolation . with nvcc builds it')}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = f"built for torch {facts.get('torch', 'unknown')}, you have {torch.__version__}: {error}"
        warnings.warn(f"mmgen_kernels: the CUDA part does not load: {reason}", stacklevel=3)
        return reason
    return None


def library_error() -> str | None:
    """Why the C++ part is not there, or None."""
    return _library_error


def build_facts() -> dict:
    """What setup.py wrote: built or not, with which compiler and torch, or the cause."""
    path = Path(__file__).parent / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def reasons_against(operator: Operator, implementation: str, device: str) -> list[str]:
    """Why `implementation` cannot serve `operator` on tensors of `device`; empty if it can."""
    if operator.parts:
        reasons = [reason for part in operator.parts for reason in reasons_against(part, implementation, device)]
        return list(dict.fromkeys(reasons))
    if implementation == "reference":
        return []
    reasons = []
    if device not in DEVICES[implementation]:
        reasons.append(f"runs on {' and '.join(DEVICES[implementation])} tensors, not on {device}")
    if implementation == "cpp":
        if _library_error:
            reasons.append(_library_error)
        elif not operator.has_cpp:
            reasons.append(f"{operator.name} has no C++ kernel")
    elif implementation not in operator.launchers:
        reasons.append(f"{operator.name} has no {implementation} kernel")
    elif implementation == "cuda" and _cuda_error:
        reasons.append(_cuda_error)
    elif implementation == "triton" and not HAS_TRITON:
        reasons.append("triton is not installed (pip install triton)")
    return reasons


def told(family: str) -> str | None:
    """The implementation that `use_backend` or the environment names for the family."""
    return _forced.get(family) or _forced.get(None)


def choose(operator: Operator, family: str, device: str) -> str:
    """The implementation that serves `operator` on `device`."""
    forced = told(family) if _forced else None
    if forced is not None:
        if reasons := reasons_against(operator, forced, device):
            raise RuntimeError(
                f"use_backend({forced!r}) cannot serve {operator.name}: {'; '.join(reasons)}\n{describe(operator, device)}"
            )
        return forced
    if (operator.name, device) in STEPS_ASIDE and torch.compiler.is_compiling():
        return INLINE
    if device == "cpu" and operator.has_cpp:  # the common case, kept short: this runs on every eager call
        return "cpp"
    for implementation in IMPLEMENTATIONS:
        if implementation not in BY_NAME_ONLY and not reasons_against(operator, implementation, device):
            break
    if implementation == "reference" and device in ("cpu", "cuda") and not torch.compiler.is_compiling():
        _warn_once(operator, device)
    return implementation


def _warn_once(operator: Operator, device: str) -> None:
    best = "cpp" if device == "cpu" else "triton"
    reason = "; ".join(reasons_against(operator, best, device)) or BY_NAME_ONLY[best]
    if (operator.name, reason) not in _warned:
        _warned.add((operator.name, reason))
        warnings.warn(f"mmgen_kernels.{operator.name} runs as plain PyTorch on {device}: {best}: {reason}", stacklevel=4)


def run(name: str, family: str, *args: Any) -> Any:
    """An operator by what serves the first argument's device, below autograd: for operators composed of others."""
    operator = OPERATORS[name]
    with torch.no_grad():
        return operator(choose(operator, family, args[0].device.type), *args)


@contextmanager
def use_backend(implementation: str, family: str | None = None) -> Iterator[None]:
    """Runs operators by one implementation inside the `with`; what it cannot serve raises instead of falling back.

    Args:
        implementation: cuda, triton, torch, cpp or reference.
        family: vq, modulation, attn, blocks, schedule or philox; None means every family. A block runs by what its parts run by.

    Raises:
        ValueError: implementation or family is none of these. Inside the `with`, RuntimeError with the reasons from a call that
            the implementation cannot serve.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)} or None, got {family!r}")
    before = _forced.get(family)
    _forced[family] = implementation
    try:
        yield
    finally:
        if before is None:
            del _forced[family]
        else:
            _forced[family] = before


def describe(operator: Operator, device: str) -> str:
    """One line per implementation: it serves, or the reasons against it."""
    if operator.parts:
        return f"{operator.name} on {device}: by what serves {', '.join(part.name for part in operator.parts)}"
    lines = [f"{operator.name} on {device}:"]
    for implementation in IMPLEMENTATIONS:
        reasons = reasons_against(operator, implementation, device)
        lines.append(f"  {implementation:<10} {'; '.join(reasons) or BY_NAME_ONLY.get(implementation, 'available')}")
    if (operator.name, device) in STEPS_ASIDE:
        lines.append(f"  torch.compile is left to itself: {STEPS_ASIDE[operator.name, device]}")
    return "\n".join(lines)


def backend_report() -> str:
    """What serves each operator on each kind of device this machine has, and the reasons against everything else.

    Returns:
        Text: for each operator and device a line per implementation, which says that it is available, or why it is not.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    forward = [o for o in OPERATORS.values() if not o.name.endswith("_backward")]
    return "\n".join(describe(operator, device) for device in devices for operator in forward)


if chosen := os.environ.get("MMGEN_KERNELS_BACKEND"):
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"MMGEN_KERNELS_BACKEND must be one of {', '.join(IMPLEMENTATIONS)}, got {chosen!r}")
    _forced[None] = chosen
if triton_attention not in TRITON_ATTENTIONS:
    raise ValueError(f"MMGEN_KERNELS_TRITON_ATTENTION must be one of {', '.join(TRITON_ATTENTIONS)}, got {triton_attention!r}")
