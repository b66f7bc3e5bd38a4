"""Cases of qk_norm_rope and of its backward: their inputs, what model code writes, and the judge.

The laws: results and gradients by the tolerance of battery/tolerance.py, against fp64 autograd of what model code writes; the same
bits in every run, on any number of threads and, of a sample, whatever the batch around it; inputs are never written.

Upstream gradients lie on a grid so coarse that their sums over tokens are exact in fp32 in any order: without angles plain PyTorch
rounds the gradient of a bias once, and the tolerance would otherwise hang on which way a tie falls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.attn.data import BF16, FEW, FP16, FP32, FP64, LAYOUTS, SAME
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import Tensors, changed_by_threads, differences, errors, repeats, written

TABLES = ("cos", "sin")  # have no gradient
AFFINE = ("q_weight", "k_weight", "q_bias", "k_bias")
OPTIONS: dict[str, Any] = {"norm": "rms", "across_heads": False, "eps": 1e-6, "interleaved": False}

# -- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Called with a device and dtypes (of q and k; of weights and biases; of the tables), it makes the arguments by name."""

    T: int = 30
    S: int | None = None  # T
    D: int = 72
    B: int = 3
    H: int = 4
    G: int = 2
    P: int | None = None  # pairs that are turned: all of D; 0: no angles
    weights: bool = True
    biases: bool = False
    across: bool = False
    per_sample: bool = False  # angles
    layout: Callable[[Tensor], Tensor] = lambda t: t
    table_layout: Callable[[Tensor], Tensor] = lambda t: t
    values: Callable[[Tensor], Tensor] = lambda t: t

    def __call__(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Tensors:
        dtype = dtypes[0]
        of_table = dtypes[2] if len(dtypes) > 2 else torch.promote_types(dtype, FP32)
        q = randn(self.B, self.T, self.H, self.D, seed=1)
        k = randn(self.B, self.T if self.S is None else self.S, self.G, self.D, seed=2)
        t = {name: self.layout(self.values(x).to(dtype).to(device)) for name, x in (("q", q), ("k", k))}
        for i, name in enumerate(AFFINE[: 2 * self.weights] + AFFINE[2 : 2 + 2 * self.biases]):
            width = self.D * ((self.H if name[0] == "q" else self.G) if self.across else 1)
            parameter = ("weight" in name) + 0.25 * randn(width, seed=10 + i)
            t[name] = parameter.to(dtypes[1 if len(dtypes) > 1 else 0]).to(device)
        if pairs := self.D // 2 if self.P is None else self.P:
            angle = 3 * randn(*((self.B,) if self.per_sample else ()), self.T, pairs, seed=20)
            angle[..., : min(2, self.T), :] = 0  # tokens that are not turned
            t |= {n: self.table_layout(v.to(of_table).to(device)) for n, v in (("cos", angle.cos()), ("sin", angle.sin()))}
        return t

    def but(self, **changed) -> Inputs:
        return replace(self, **changed)


def every_other(t: Tensor) -> Tensor:
    """The last dimension is not contiguous, as that of a table that holds each angle twice; the second is NaN here."""
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]


def first_half(t: Tensor) -> Tensor:
    return torch.cat((t, torch.full_like(t, torch.nan)), -1)[..., : t.shape[-1]]


def unaligned(t: Tensor) -> Tensor:
    """It begins one element behind an aligned address."""
    return F.pad(t.flatten(), (1, 0))[1:].view(t.shape)


def offset(t: Tensor) -> Tensor:
    """mean / deviation = 100."""
    return t + 100


def zero_rows(t: Tensor) -> Tensor:
    t = t.clone()
    t[:, ::3] = 0
    return t


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[1, 2, 1, 3], t[2, -1, -1, -1] = value, -value
        return t

    return change


# -- what model code writes -------------------------------------------------------------------------------------------


def model_code(t: Tensors, options: dict[str, Any]) -> Tensors:
    return {n: turned(normed(t[n], t.get(f"{n}_weight"), t.get(f"{n}_bias"), **options), t, options["interleaved"]) for n in "qk"}


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str | None, across_heads: bool, eps: float, **_) -> Tensor:
    """RMS norm in fp32, rounded, and then multiplied by the weight; F.layer_norm."""
    if norm is None:
        return x
    rows = x.flatten(2) if across_heads else x
    if norm == "layer" and all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        rows = F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
    else:
        wide = rows.to(torch.promote_types(x.dtype, FP32))
        if norm == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        rows = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        rows = rows if weight is None else rows * weight
        rows = rows if bias is None else rows + bias
    return rows.view(x.shape).to(x.dtype)


def turned(x: Tensor, t: Tensors, interleaved: bool) -> Tensor:
    """In fp32 with a table that holds each angle twice, as wide as the channels that are turned."""
    if "cos" not in t:
        return x
    cos, sin = ((v.repeat_interleave(2, -1) if interleaved else torch.cat((v, v), -1)).unsqueeze(-2) for v in (t["cos"], t["sin"]))
    part, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    wide = part.to(torch.promote_types(x.dtype, cos.dtype))
    if interleaved:
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        other = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    return torch.cat(((wide * cos + other * sin).to(x.dtype), rest), -1)


# -- the judge --------------------------------------------------------------------------------------------------------


def call(t: Tensors, options: dict[str, Any]) -> Tensors:
    """The public function; its outputs by name."""
    given: dict[str, Any] = t | options
    return dict(zip("qk", mk.qk_norm_rope(**given), strict=True))


def run(function: Callable, t: Tensors, options: dict[str, Any], upstream: Tensors | None) -> Tensors:
    """Outputs or, given `upstream` gradients of some of them, the gradients of every tensor that has one."""
    if upstream is None:
        return function(t, options)
    leaves = {name: v.detach().requires_grad_() for name, v in t.items() if name not in TABLES}
    outputs = function(t | leaves, options)
    weights = [gradient.to(outputs[name]) for name, gradient in upstream.items()]
    gradients = torch.autograd.grad([outputs[name] for name in upstream], list(leaves.values()), weights, allow_unused=True)
    return {
        f"grad_{name}": torch.zeros_like(of) if gradient is None else gradient
        for (name, of), gradient in zip(leaves.items(), gradients, strict=True)
    }


def prepared(inputs: Inputs, gradients: bool, uses: str, changed: dict[str, Any]) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged when the outputs named by `uses` are differentiated."""
    options = OPTIONS | {"across_heads": inputs.across} | changed

    def prepare(device: torch.device, dtypes):
        t = inputs(device, dtypes)
        on_cpu = {name: v.detach().cpu().clone() for name, v in t.items()}
        exact = {name: v.double() for name, v in on_cpu.items()}
        upstream = None
        if gradients:  # multiples of 1/16 below 8: seven bits
            made = {n: (randn(*t[n].shape, seed=90 + i) * 16).round().clamp(-127, 127) / 16 for i, n in enumerate("qk")}
            upstream = {n: made[n] for n in uses}
        truth = run(model_code, exact, options, upstream)
        plain = run(model_code, on_cpu, options, upstream)
        if upstream is not None:
            upstream = {name: gradient.to(device) for name, gradient in upstream.items()}

        def once() -> Tensors:
            return run(call, t, options, upstream)

        def judge() -> Outcome:
            results = once()
            worst, failures = errors(results, plain, truth)
            failures += written(t, on_cpu)
            failures += differences("alone it differs, sample", lone_samples(t, options, upstream, results))
            failures += changed_by_threads(device, results, once)
            return Outcome(worst, repeats(results, once), tuple(failures))

        return judge

    return prepare


def lone_samples(t: Tensors, options: dict, upstream: Tensors | None, results: Tensors) -> list:
    """What a sample has for itself, in the batch and alone: its outputs, and the gradients of its q and k."""
    B = len(t["q"])
    own = [n for n, v in t.items() if n in ("q", "k") or (n in TABLES and v.dim() == 3)]
    compared = [n for n in results if n.removeprefix("grad_") in ("q", "k")]
    found = []
    for sample in {0, B - 1} if B > 1 else ():
        alone = t | {n: t[n][sample : sample + 1] for n in own}
        part = None if upstream is None else {n: g[sample : sample + 1] for n, g in upstream.items()}
        got = run(call, alone, options, part)
        found.append((sample, {n: results[n][sample : sample + 1] for n in compared}, {n: got[n] for n in compared}))
    return found


def pair(name: str, inputs: Inputs, dtypes: tuple, *, quick: bool = False, uses: str = "qk", **options: Any) -> list[Case]:
    """The same inputs judged forward and backward."""
    case = partial(Case, "attn", name=name, dtypes=dtypes, quick=quick)
    return [
        case(operator="qk_norm_rope", prepare=prepared(inputs, False, uses, options)),
        case(operator="qk_norm_rope_backward", prepare=prepared(inputs, True, uses, options)),
    ]


# -- cases ------------------------------------------------------------------------------------------------------------

ROPE = Inputs()
ACROSS = Inputs(across=True)
EVERY = Inputs(biases=True)
WIDE, NARROW = SAME[:2], SAME[1:]
MIXED = (
    (BF16, FP32, FP32),  # autocast: the parameters of a norm are fp32
    (FP16, FP32, FP32),
    (FP32, BF16, BF16),
    (BF16, FP16, FP64),
    (FP64, FP32, FP32),
)
# Head dimensions of models, and such as fill no vector; T next to every tile's edge. The law for fp32 wants some hundred rows.
HEAD_DIMS = (16, 30, 64, 80, 96, 128, 256)
LENGTHS = ((64, 1), (3, 255), (2, 257), (3, 256))

CASES = [
    *pair("flux", ROPE.but(D=128), SAME, interleaved=True, quick=True),
    *pair("half_split", ROPE, SAME, quick=True),
    *pair("wan", ACROSS.but(D=128), SAME, interleaved=True, quick=True),
    *pair("across_half_split", ACROSS.but(biases=True), SAME, norm="layer", quick=True),
    *pair("cogvideo", EVERY.but(D=64), SAME, norm="layer", interleaved=True, quick=True),
    *[c for i in (False, True) for c in pair(f"partial_{i}", EVERY.but(P=10), NARROW, interleaved=i, quick=True)],
    *[c for i in (False, True) for c in pair(f"partial_across_{i}", ACROSS.but(P=17), NARROW, interleaved=i)],
    *pair("no_angles_rms", EVERY.but(P=0, S=41), NARROW),
    *pair("no_angles_across", ACROSS.but(P=0, S=41), NARROW),
    # what rounds once in plain PyTorch too is no bar in 16 bits
    *pair("no_angles_layer", EVERY.but(P=0, S=41), WIDE, norm="layer"),
    *[c for i in (False, True) for c in pair(f"only_angles_{i}", ROPE.but(weights=False), WIDE, norm=None, interleaved=i)],
    *pair("only_angles_partial", ROPE.but(weights=False, P=9), WIDE, norm=None),
    *pair("nothing", ROPE.but(weights=False, P=0), SAME, norm=None),
    *[c for n in ("rms", "layer") for c in pair(f"no_weight_{n}", ROPE.but(weights=False), NARROW, norm=n, interleaved=True)],
    *pair("only_biases", ROPE.but(weights=False, biases=True), NARROW, norm="layer"),
    *pair("eps", ROPE, FEW, eps=0.1),
    *pair("angles_of_each_sample", ROPE.but(per_sample=True), FEW, interleaved=True),
    *pair("mixed_dtypes", EVERY, MIXED, quick=True),
    *pair("mixed_dtypes_across", ACROSS.but(biases=True), MIXED, norm="layer", interleaved=True),
    *[c for d in HEAD_DIMS for c in pair(f"D{d}", ROPE.but(D=d, H=3, G=3), FEW, interleaved=d % 3 == 0)],
    # of few channels some rows have next to no variance, and next to nothing left of their gradient: eps keeps them apart
    *[c for d in (1, 2, 6, 7, 35) for c in pair(f"D{d}", ROPE.but(D=d, P=d // 4 or d // 2), WIDE, eps=0.5)],
    *[c for b, n in LENGTHS for c in pair(f"{b}x{n}", EVERY.but(B=b, T=n, H=1, G=1), FEW, interleaved=True)],
    *pair("many_heads", ROPE.but(T=17, H=38, G=5, D=64), FEW),
    *pair("many_heads_across", ACROSS.but(B=2, T=17, H=40, G=40, D=128), FEW, interleaved=True),
    *pair("one_wide_head", ROPE.but(T=17, H=1, G=1, D=2048), FEW, interleaved=True),
    *[c for n, f in LAYOUTS.items() for c in pair(n, EVERY.but(layout=f), FEW, interleaved=True)],
    *[c for n, f in LAYOUTS.items() for c in pair(f"{n}_across", ACROSS.but(layout=f), FEW)],
    *[c for f in (unaligned, every_other) for c in pair(f.__name__, EVERY.but(layout=f, table_layout=f), FEW, norm="layer")],
    *pair("table_every_other", ROPE.but(table_layout=every_other), FEW, interleaved=True),
    *pair("table_first_half", ROPE.but(table_layout=first_half, per_sample=True), FEW),
    *[c for n in ("rms", "layer") for c in pair(f"offset_{n}", ROPE.but(values=offset), NARROW, norm=n)],
    *pair("zero_rows", ROPE.but(values=zero_rows), FEW, eps=1e-3),
    *[c for n in ("rms", "layer") for c in pair(f"nan_{n}", ROPE.but(values=spoiled(torch.nan)), WIDE, norm=n)],
    *[c for n in ("rms", "layer") for c in pair(f"inf_{n}", ROPE.but(values=spoiled(torch.inf)), WIDE, norm=n)],
    *pair("nan_across", ACROSS.but(values=spoiled(torch.nan)), WIDE),
    *[c for n in ("B", "T") for c in pair(f"no_{n}", EVERY.but(**{n: 0}), FEW)],
    *[c for n in "qk" for c in pair(f"only_{n}", EVERY, FEW, uses=n)],
]  # fmt: skip
