"""How a case of the family is judged.

The laws: results and gradients by the tolerance of battery/tolerance.py, against fp64 autograd of what model code writes; the same
bits in every run; inputs are never written; without a gradient to come, the same result bit for bit. The matrix products are
torch's, which promise no bits across batches and threads: neither do the blocks. As for attention alone, the bar is the formula in
the dtype, as of two fused kernels of one accuracy either may be the nearer one.

Gradients of vectors and biases are sums over tokens of what products have rounded, a few numbers whose errors go together. One draw
of all tensors would judge them by luck: in bf16 24 draws at once give 0.64 to 1.0 of plain PyTorch's error, and single ones up to
1.17. So gradients are judged over several draws at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.draws import randint, randn
from mmgen_kernels.battery.laws import Tensors, errors, repeats, same_bits, written
from mmgen_kernels.battery.modulation.law import by_token, normed
from mmgen_kernels.library import OPERATORS

DRAWS, DRAWS_OF_HALVES = 8, 24
INTEGERS = ("rows", "key_lengths", "cu_seqlens")
OF_QK = ("q_weight", "k_weight", "q_bias", "k_bias")
CONSTANT = (*INTEGERS, "cos", "sin")  # what gets no gradient
HALVES = {
    "adaln_attention": ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
    "adaln_mlp": ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
}
VECTORS = ("shift", "scale", "gate")
POSITIONAL: dict[str, tuple[str, ...]] = {name: ("x", *VECTORS, *of) for name, of in HALVES.items()}
POSITIONAL["dit_block"] = (
    "x",
    *(f"{vector}_{half}" for half in ("msa", "mlp") for vector in VECTORS),
    *HALVES["adaln_attention"],
    *HALVES["adaln_mlp"],
)


def call(operator: str, t: Tensors, options: dict[str, Any]) -> Tensor:
    """The public function; of the activation, which has none, the operator."""
    if operator == "mlp_activation":
        implementation = backends.choose(OPERATORS[operator], "blocks", t["hidden"].device.type)
        return OPERATORS[operator](implementation, t["hidden"], options["activation"])
    names = POSITIONAL[operator]
    named: dict[str, Any] = {n: v for n, v in t.items() if n not in names} | options
    return getattr(mk, operator)(*(t.get(name) for name in names), **named)


# -- what model code writes -------------------------------------------------------------------------------------------


def model_code(operator: str, t: Tensors, options: dict[str, Any]) -> Tensor:
    if operator == "mlp_activation":
        return activate(t["hidden"], options["activation"])
    if operator != "dit_block":
        return half(operator, t, options)
    norms = ("weight", "bias")
    first, second = (
        {n: v for n, v in t.items() if n in (*CONSTANT, *OF_QK, *HALVES[name])}
        | {n: t[f"{n}_{suffix}"] for n in VECTORS if f"{n}_{suffix}" in t}
        | {n: t[f"norm{i}_{n}"] for n in norms if f"norm{i}_{n}" in t}
        for i, (name, suffix) in enumerate((("adaln_attention", "msa"), ("adaln_mlp", "mlp")), start=1)
    )
    x = half("adaln_attention", first | {"x": t["x"]}, options)
    return half("adaln_mlp", second | {"x": x}, options)


def half(operator: str, t: Tensors, options: dict[str, Any]) -> Tensor:
    x, vectors = t["x"], {n: by_token(t[n], t) for n in VECTORS if n in t}
    h = normed(x, options.get("norm", "layer"), t.get("weight"), t.get("bias"), options.get("eps", 1e-6))
    h = h * (1 + vectors["scale"]) if "scale" in t else h
    h = h + vectors["shift"] if "shift" in t else h
    first = t["qkv_weight"] if operator == "adaln_attention" else t["fc1_weight"]
    y = attend(h.to(first.dtype), t, options) if operator == "adaln_attention" else feed_forward(h.to(first.dtype), t, options)
    return (x + (vectors["gate"] * y if "gate" in t else y)).to(x.dtype)


def attend(h: Tensor, t: Tensors, options: dict[str, Any]) -> Tensor:
    heads = F.linear(h, t["qkv_weight"], t.get("qkv_bias")).unflatten(-1, (3, options["num_heads"], -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, head_dim)
    q, k = (turned(x, t.get(f"{n}_weight"), t.get(f"{n}_bias"), t, options) for n, x in (("q", q), ("k", k)))
    T, mask = h.shape[1], None
    if "key_lengths" in t:
        mask = (torch.arange(T) < t["key_lengths"].cpu()[:, None])[:, None, None]  # (B, 1, 1, T)
    if "cu_seqlens" in t:
        own = torch.bucketize(torch.arange(T), t["cu_seqlens"].cpu().long(), right=True)
        mask = own[:, None] == own
    logits = (options.get("attention_scale") or q.shape[-1] ** -0.5) * q @ k.mT
    out = (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).flatten(2), t["proj_weight"], t.get("proj_bias"))


def turned(x: Tensor, weight: Tensor | None, bias: Tensor | None, t: Tensors, options: dict[str, Any]) -> Tensor:
    """Norm of each head, and pairs of channels turned by their token's angles: x (B, H, T, head_dim)."""
    if options.get("qk_norm") is not None:
        x = normed(x, options["qk_norm"], weight, bias, options.get("qk_eps", 1e-6))
    if "cos" not in t:
        return x
    P = t["cos"].shape[-1]
    cos, sin = (t[n] if t[n].dim() == 2 else t[n].unsqueeze(1) for n in ("cos", "sin"))
    if options.get("interleaved"):
        a, b = x[..., : 2 * P : 2], x[..., 1 : 2 * P : 2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x[..., :P], x[..., P : 2 * P]
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((pairs, x[..., 2 * P :]), -1).to(x.dtype)


def feed_forward(h: Tensor, t: Tensors, options: dict[str, Any]) -> Tensor:
    hidden = F.linear(h, t["fc1_weight"], t.get("fc1_bias"))
    return F.linear(activate(hidden, options.get("activation", "gelu_tanh")), t["fc2_weight"], t.get("fc2_bias"))


def activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, value = hidden.chunk(2, -1)
        return F.silu(gate) * value
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


# -- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Called with an operator, a device and dtypes (of x; of the vectors; of the projections), it makes the arguments by name,
    others for each `draw`.

    `without`: arguments that are not given; `affine`: of the norm's weight and bias, those that are.
    """

    B: int = 3
    T: int = 65
    H: int = 2
    head_dim: int = 24
    ratio: float = 4  # M / D
    vectors: tuple[int, ...] | None = None  # leading sizes; None: (B,)
    without: tuple[str, ...] = ()
    affine: tuple[str, ...] = ()
    integers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rows: int | None = None
    qk_affine: tuple[str, ...] = ()  # of OF_QK
    pairs: int = 0  # of channels that are turned
    angles: tuple[int, ...] = ()  # leading sizes of cos and sin, but for the tokens

    def but(self, **changed: Any) -> Inputs:
        return replace(self, **changed)

    def __call__(
        self, operator: str, device: torch.device, dtypes: tuple[torch.dtype, ...], options: dict[str, Any], draw: int
    ) -> Tensors:
        D, (B, T) = self.H * self.head_dim, (self.B, self.T)
        M = int(self.ratio * D)
        of_x, of_vectors, of_projections = (*dtypes, *(dtypes[-1],) * (3 - len(dtypes)))
        wide = 2 * M if options.get("activation") == "swiglu" else M
        shapes: dict[str, tuple[int, ...]] = {"x": (B, T, D), "hidden": (B, T, wide)}
        shapes |= {"qkv_weight": (3 * D, D), "qkv_bias": (3 * D,), "proj_weight": (D, D), "proj_bias": (D,)}
        shapes |= {"fc1_weight": (wide, D), "fc1_bias": (wide,), "fc2_weight": (D, M), "fc2_bias": (D,)}
        if operator == "mlp_activation":
            return {"hidden": (2 * randn(*shapes["hidden"], seed=7 + 1000 * draw)).to(of_x).to(device)}
        leading = (self.rows,) if self.rows else (B,) if self.vectors is None else self.vectors
        affine = [f"norm{i}_{n}" for i in (1, 2) for n in self.affine] if operator == "dit_block" else list(self.affine)
        affine += self.qk_affine
        t: Tensors = {}
        for seed, name in enumerate((*POSITIONAL[operator], *affine)):
            of_affine = (self.head_dim,) if name in self.qk_affine else (D,)
            shape = shapes.get(name) or (of_affine if name in affine else (*leading, D))
            value = randn(*shape, seed=seed + 1000 * draw)
            if name in shapes and name != "x":
                value = value / (shape[1] ** 0.5 if len(shape) == 2 else 4)
            dtype = of_x if name == "x" or name in affine else of_projections if name in shapes else of_vectors
            if name not in self.without:
                value = value if name in shapes else value / 2
                t[name] = (1 + value / 2 if name in affine and name.endswith("weight") else value).to(dtype).to(device)
        if self.rows:
            t["rows"] = randint(0, self.rows, (B, T), seed=99 + 1000 * draw).int().to(device)
        if self.pairs:
            angle = 3 * randn(*self.angles, T, self.pairs, seed=98 + 1000 * draw)
            t |= {"cos": angle.cos().float().to(device), "sin": angle.sin().float().to(device)}
        integers = self.integers if operator != "adaln_mlp" else {}
        return t | {name: torch.tensor(v, dtype=torch.int32, device=device) for name, v in integers.items()}


# -- the judge --------------------------------------------------------------------------------------------------------


def run(function: Callable, operator: str, t: Tensors, options: dict[str, Any], upstream: Tensor | None) -> Tensors:
    """The output or, given its gradient, the gradients of every float tensor."""
    if upstream is None:
        with torch.no_grad():
            return {"out": function(operator, t, options)}
    leaves = {name: v.detach().requires_grad_() for name, v in t.items() if name not in CONSTANT}
    out = function(operator, t | leaves, options)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
    return {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def prepared(operator: str, inputs: Inputs, gradients: bool, options: dict[str, Any]) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged."""
    options = dict(options)
    if operator in ("adaln_attention", "dit_block"):
        options["num_heads"] = inputs.H

    def prepare(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Callable[[], Outcome]:
        count = 1 if not gradients else DRAWS_OF_HALVES if any(dtype.itemsize == 2 for dtype in dtypes) else DRAWS
        draws = [Draw(operator, inputs, gradients, options, device, dtypes, number) for number in range(count)]
        truth, plain = together([d.truth for d in draws]), together([d.plain for d in draws])

        def judge() -> Outcome:
            own = [d.once() for d in draws]
            worst, failures = errors(together(own), plain, truth)
            failures += [failure for d in draws for failure in written(d.t, d.on_cpu)]
            if not gradients:
                t = draws[0].t
                leaves = t | {n: v.detach().requires_grad_() for n, v in t.items() if n not in CONSTANT}
                trained = call(operator, leaves, options).detach()
                failures += [] if same_bits(trained, own[0]["out"]) else ["out: other bits where a gradient is to come"]
            return Outcome(worst, repeats(own[0], draws[0].once), tuple(failures))

        return judge

    return prepare


class Draw:
    """One draw of all tensors, what is right, and what plain PyTorch makes of it."""

    def __init__(self, operator, inputs, gradients, options, device, dtypes, number):
        self.t = inputs(operator, device, dtypes, options, number)
        self.on_cpu = {name: v.detach().cpu().clone() for name, v in self.t.items()}
        exact = {name: v if name in INTEGERS else v.double() for name, v in self.on_cpu.items()}
        shape = model_code(operator, self.on_cpu, options).shape
        upstream = randn(*shape, seed=90 + 1000 * number).to(dtypes[0]) if gradients else None
        self.truth = run(model_code, operator, exact, options, upstream)
        self.plain = run(model_code, operator, self.on_cpu, options, upstream)
        upstream = None if upstream is None else upstream.to(device)
        self.once = lambda: run(call, operator, self.t, options, upstream)


def together(draws: list[Tensors]) -> Tensors:
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def pair(operator: str, name: str, inputs: Inputs, dtypes: tuple, *, quick: bool = False, **options: Any) -> list[Case]:
    """The same inputs judged forward and backward."""
    return [
        Case("blocks", operator, name, dtypes, prepared(operator, inputs, False, options), quick),
        Case("blocks", f"{operator}_backward", name, dtypes, prepared(operator, inputs, True, options), quick),
    ]
