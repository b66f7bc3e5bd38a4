"""How a case of the family is judged.

The laws: results and gradients by the tolerance of battery/tolerance.py, against fp64 autograd of what model code writes; the same
bits in every run, on any number of threads and, of a sample, whatever the batch around it; inputs are never written; the fused
seam gives bit for bit what its two halves give.

Upstream gradients lie on a grid so coarse that their sums over tokens are exact in fp32 in any order: where plain PyTorch rounds
such a sum once (the gradient of a shift), the tolerance would otherwise hang on which way a tie falls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import Tensors, changed_by_threads, differences, errors, repeats, written

VECTORS = ("gate", "shift", "scale", "shift_2", "scale_2")  # in the order of the table's rows
OPTIONS: dict[str, dict[str, Any]] = {
    "adaln": {"norm": "layer", "eps": 1e-6, "dtype": None},
    "gate_residual": {"gate_fn": "identity", "post_norm": None, "post_eps": 1e-6},
}
OPTIONS["gate_residual_adaln"] = OPTIONS["gate_residual"] | OPTIONS["adaln"]
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda gate: gate,
    "tanh": torch.tanh,
    "sigmoid_one_minus": lambda gate: torch.sigmoid(1 - gate),
}


def call(operator: str, t: Tensors, options: dict[str, Any]) -> Tensors:
    """The public function; its outputs by name."""
    several = "shift_2" in t or "scale_2" in t
    shift, scale = ((t.get(n), t.get(f"{n}_2")) if several else t.get(n) for n in ("shift", "scale"))
    shared: dict[str, Any] = {"table": t.get("table"), "rows": t.get("rows")} | options
    affine: dict[str, Any] = {"weight": t.get("weight"), "bias": t.get("bias")}
    if operator == "adaln":
        residual, modulated = None, mk.adaln(t["x"], shift, scale, **affine, **shared)
    elif operator == "gate_residual":
        return {"residual": mk.gate_residual(t["x"], t["y"], t.get("gate"), post_weight=t.get("post_weight"), **shared)}
    else:
        residual, modulated = mk.gate_residual_adaln(
            t["x"], t["y"], t.get("gate"), shift, scale, post_weight=t.get("post_weight"), **affine, **shared
        )
    outputs = {} if residual is None else {"residual": residual}
    return outputs | (dict(zip(("modulated", "modulated_2"), modulated, strict=True)) if several else {"modulated": modulated})


# -- what model code writes -------------------------------------------------------------------------------------------


def model_code(operator: str, t: Tensors, options: dict[str, Any]) -> Tensors:
    x, given = t["x"], [name for name in VECTORS if name in t]
    vectors = {name: by_token(t[name] if "table" not in t else t[name] + t["table"][i], t) for i, name in enumerate(given)}
    outputs = {}
    if operator != "adaln":
        y = t["y"]
        if options["post_norm"] is not None:
            y = normed(y, options["post_norm"], t.get("post_weight"), None, options["post_eps"])
        update = GATES[options["gate_fn"]](vectors["gate"]) * y if "gate" in t else y
        outputs["residual"] = x = (x + update).to(x.dtype)
    if operator != "gate_residual":
        n = normed(x, options["norm"], t.get("weight"), t.get("bias"), options["eps"])
        for suffix in ("", "_2") if "shift_2" in t or "scale_2" in t else ("",):
            modulated = n * (1 + vectors[f"scale{suffix}"]) if f"scale{suffix}" in t else n
            modulated = modulated + vectors[f"shift{suffix}"] if f"shift{suffix}" in t else modulated
            outputs[f"modulated{suffix}"] = modulated.to(options["dtype"] or x.dtype)
    return outputs


def by_token(vector: Tensor, t: Tensors) -> Tensor:
    """What broadcasts with x."""
    x = t["x"]
    if vector.dim() == 1:
        return vector  # (D,)
    if "rows" in t:
        return vector[t["rows"].long().clamp(0, len(vector) - 1)]  # x's shape
    if vector.dim() == 2:
        return vector.view(len(vector), *(1,) * (x.dim() - 2), x.shape[-1])  # (B, 1, D)
    tokens = x.shape[1:-1].numel()
    return vector.repeat_interleave(tokens // max(1, vector.shape[1]), 1).reshape(x.shape)


def normed(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """F.layer_norm, or RMS norm as model code has it: in fp32, rounded, and then multiplied by the weight."""
    if norm == "layer" and all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if norm == "layer":
        n = F.layer_norm(x, x.shape[-1:], eps=eps)
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        n = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


# -- the judge --------------------------------------------------------------------------------------------------------


def run(function: Callable, operator: str, t: Tensors, options: dict[str, Any], upstream: Tensors | None) -> Tensors:
    """Outputs or, given `upstream` gradients of some of them, the gradients of every float tensor."""
    if upstream is None:
        return function(operator, t, options)
    leaves = {name: v.detach().requires_grad_() for name, v in t.items() if name != "rows"}
    outputs = function(operator, t | leaves, options)
    weights = [gradient.to(outputs[name]) for name, gradient in upstream.items()]
    gradients = torch.autograd.grad([outputs[name] for name in upstream], list(leaves.values()), weights, allow_unused=True)
    return {
        f"grad_{name}": torch.zeros_like(of) if gradient is None else gradient
        for (name, of), gradient in zip(leaves.items(), gradients, strict=True)
    }


def upstream_of(outputs: Tensors, uses: tuple[str, ...]) -> Tensors:
    """Multiples of 1/16 below 8: seven bits."""
    made = {n: (randn(*v.shape, seed=90 + i) * 16).round().clamp(-127, 127) / 16 for i, (n, v) in enumerate(outputs.items())}
    return {name: gradient for name, gradient in made.items() if name in uses}


ALL = ("residual", "modulated", "modulated_2")


def prepared(
    operator: str, inputs: Callable[[torch.device, Any], Tensors], gradients: bool, uses: tuple[str, ...] = ALL, **changed: Any
) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged when the outputs named by `uses` are differentiated."""
    options = OPTIONS[operator] | changed

    def prepare(device: torch.device, dtypes):
        t = inputs(device, dtypes)
        on_cpu = {name: v.detach().cpu().clone() for name, v in t.items()}
        exact = {name: v if name == "rows" else v.double() for name, v in on_cpu.items()}
        upstream = upstream_of(model_code(operator, on_cpu, options), uses) if gradients else None
        truth = run(model_code, operator, exact, options | ({"dtype": None} if "dtype" in options else {}), upstream)
        plain = run(model_code, operator, on_cpu, options, upstream)
        if upstream is not None:
            upstream = {name: gradient.to(device) for name, gradient in upstream.items()}

        def once() -> Tensors:
            return run(call, operator, t, options, upstream)

        def judge() -> Outcome:
            results = once()
            worst, failures = errors(results, plain, truth)
            failures += written(t, on_cpu)
            failures += differences("alone it differs, sample", lone_samples(operator, t, options, upstream, results))
            if not gradients and operator == "gate_residual_adaln":
                failures += differences("not what the two halves give", [("", results, halves(t, options))])
            failures += changed_by_threads(device, results, once)
            return Outcome(worst, repeats(results, once), tuple(failures))

        return judge

    return prepare


def pair(
    operator: str, name: str, inputs: Callable, dtypes: tuple, *, quick: bool = False, uses: tuple[str, ...] = ALL, **options: Any
) -> list[Case]:
    """The same inputs judged forward and backward."""
    return [
        Case("modulation", operator, name, dtypes, prepared(operator, inputs, False, **options), quick),
        Case("modulation", f"{operator}_backward", name, dtypes, prepared(operator, inputs, True, uses, **options), quick),
    ]


def lone_samples(operator: str, t: Tensors, options: dict, upstream: Tensors | None, results: Tensors) -> list:
    """What a sample has for itself, in the batch and alone: its outputs, and its gradients of what it does not share."""
    B = len(t["x"])
    own = [n for n, v in t.items() if n in ("x", "y", "rows") or (n in VECTORS and v.dim() > 1 and "rows" not in t)]
    compared = [n for n in results if n.removeprefix("grad_") in own] if upstream is not None else list(results)
    found = []
    for sample in {0, B - 1} if B > 1 else ():
        alone = t | {n: t[n][sample : sample + 1] for n in own}
        part = None if upstream is None else {n: g[sample : sample + 1] for n, g in upstream.items()}
        got = run(call, operator, alone, options, part)
        found.append((sample, {n: results[n][sample : sample + 1] for n in compared}, {n: got[n] for n in compared}))
    return found


def halves(t: Tensors, options: dict[str, Any]) -> Tensors:
    """The seam as gate_residual and adaln one after the other."""
    first, second = ({n: v for n, v in t.items() if n not in ("gate", "table")} for _ in range(2))
    if "gate" in t:
        first["gate"] = t["gate"]
    if "table" in t:
        parts = t["table"].split([int("gate" in t), len(t["table"]) - int("gate" in t)])
        for half, part in zip((first, second), parts, strict=True):
            half |= {"table": part} if len(part) else {}
    outputs = call("gate_residual", first, {n: options[n] for n in OPTIONS["gate_residual"]})
    return outputs | call("adaln", second | {"x": outputs["residual"]}, {n: options[n] for n in OPTIONS["adaln"]})
