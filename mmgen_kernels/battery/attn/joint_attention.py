"""Cases of joint_attention and of its backward. The laws and the bar are those of `attention`: see battery/attn/law.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels.battery import Case, Outcome
from mmgen_kernels.battery.attn.data import FEW, LAYOUTS, SAME
from mmgen_kernels.battery.attn.law import Attend, formula, model_code
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import Tensors, changed_by_threads, differences, errors, repeats, written

FLOATS = ("q_1", "k_1", "v_1", "q_2", "k_2", "v_2")
OUTS = ("out_1", "out_2")
LENGTHS = ("key_lengths_1", "key_lengths_2")

# -- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Called with a device and dtypes, it makes queries, keys, values and lengths by name."""

    T: tuple[int, int] = (23, 40)
    S: tuple[int, int] | None = None  # T
    D: int = 72
    B: int = 3
    H: int = 4
    G: int = 4
    key_lengths: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    integers: torch.dtype = torch.int32
    layout: Callable[[Tensor], Tensor] = lambda t: t
    values: Callable[[Tensors], Tensors] = lambda t: t

    def __call__(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Tensors:
        t: Tensors = {}
        for i, (T, S) in enumerate(zip(self.T, self.S or self.T, strict=True)):
            shapes = ((self.B, T, self.H, self.D), (self.B, S, self.G, self.D), (self.B, S, self.G, self.D))
            names = FLOATS[3 * i : 3 * i + 3]
            t |= {name: randn(*shape, seed=10 * i + j) for j, (name, shape) in enumerate(zip(names, shapes, strict=True))}
        t = {name: self.layout(v.to(dtypes[0])).to(device) for name, v in self.values(t).items()}
        lengths = zip(LENGTHS, self.key_lengths, strict=True)
        return t | {name: torch.tensor(v, dtype=self.integers, device=device) for name, v in lengths if v is not None}

    def but(self, **changed) -> Inputs:
        return replace(self, **changed)


def padding_of_nan(*lengths: tuple[int, ...] | None) -> Callable[[Tensors], Tensors]:
    """In the keys and values that no query sees."""

    def change(t: Tensors) -> Tensors:
        t = {name: v.clone() for name, v in t.items()}
        for stream, of_samples in zip(("1", "2"), lengths, strict=True):
            for b, length in enumerate(of_samples or ()):
                t[f"k_{stream}"][b, max(length, 0) :] = t[f"v_{stream}"][b, max(length, 0) :] = torch.nan
        return t

    return change


def spoiled(value: float) -> Callable[[Tensors], Tensors]:
    """A query of sample 0 and a value of sample 1, in different streams."""

    def change(t: Tensors) -> Tensors:
        t = {name: v.clone() for name, v in t.items()}
        t["q_1"][0, 3, 1, 2] = t["v_2"][1, 5, 0, 1] = value
        return t

    return change


# -- the judge --------------------------------------------------------------------------------------------------------


def call(t: Tensors, options: dict[str, Any]) -> Tensors:
    """The public function; its outputs by name."""
    queries, keys, values = ([t[f"{n}_1"], t[f"{n}_2"]] for n in "qkv")
    lengths = [t.get(n) for n in LENGTHS] if any(n in t for n in LENGTHS) else None
    return dict(zip(OUTS, mk.joint_attention(queries, keys, values, key_lengths=lengths, **options), strict=True))


def sample_by_sample(attend: Attend, t: Tensors, options: dict[str, Any]) -> Tensors:
    """`attend` of both streams' queries on the keys of both that each sample may see: what is masked is not there."""
    q = torch.cat((t["q_1"], t["q_2"]), 1).transpose(1, 2)  # (B, H, T, D)
    lengths = [t.get(n, torch.full((len(q),), t[f"k_{n[-1]}"].shape[1])) for n in LENGTHS]
    outs = []
    for b in range(len(q)):
        k, v = (
            torch.cat([t[f"{n}_{i + 1}"][b : b + 1, : max(int(lengths[i][b]), 0)] for i in range(2)], 1).transpose(1, 2)
            for n in "kv"
        )  # (1, G, S, D)
        one = q[b : b + 1]
        outs.append(attend(one, k, v, None, False, options.get("scale") or q.shape[-1] ** -0.5)[0] if k.numel() else one * 0)
    out = torch.cat(outs).transpose(1, 2) if outs else q.transpose(1, 2)
    return dict(zip(OUTS, out.split((t["q_1"].shape[1], t["q_2"].shape[1]), 1), strict=True))


def run(function: Callable[[Tensors], Tensors], t: Tensors, upstream: Tensors | None) -> Tensors:
    """Outputs or, given `upstream` gradients of some of them, the gradients of every float tensor."""
    if upstream is None:
        return function(t)
    leaves = {name: t[name].detach().requires_grad_() for name in FLOATS}
    outputs = function(t | leaves)
    weights = [upstream[name].to(outputs[name]) for name in upstream]
    gradients = torch.autograd.grad([outputs[name] for name in upstream], list(leaves.values()), weights, materialize_grads=True)
    return {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def prepared(inputs: Inputs, gradients: bool, uses: tuple[str, ...], options: dict[str, Any]) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged when the outputs named by `uses` are differentiated."""

    def prepare(device: torch.device, dtypes):
        t = inputs(device, dtypes)
        on_cpu = {name: v.detach().cpu().clone() for name, v in t.items()}
        exact = {name: v.double() if name in FLOATS else v for name, v in on_cpu.items()}
        upstream = None
        if gradients:
            made = {n: randn(*t[f"q_{n[-1]}"].shape, seed=90 + i) for i, n in enumerate(OUTS)}
            upstream = {n: made[n].to(dtypes[0]).double() for n in uses}
        truth = run(lambda t: sample_by_sample(formula, t, options), exact, upstream)
        plain = run(lambda t: sample_by_sample(model_code, t, options), on_cpu, upstream)
        if upstream is not None:
            upstream = {name: gradient.to(device) for name, gradient in upstream.items()}

        def once() -> Tensors:
            return run(lambda t: call(t, options), t, upstream)

        def judge() -> Outcome:
            results = once()
            worst, failures = errors(results, plain, truth)
            failures += written(t, on_cpu) + changed_by_threads(device, results, once)
            failures += differences("alone it differs, sample", lone_samples(t, options, upstream, results))
            return Outcome(worst, repeats(results, once), tuple(failures))

        return judge

    return prepare


def lone_samples(t: Tensors, options: dict, upstream: Tensors | None, results: Tensors) -> list:
    B, found = len(t["q_1"]), []
    for sample in {0, B - 1} if B > 1 else ():
        at = slice(sample, sample + 1)
        part = None if upstream is None else {n: g[at] for n, g in upstream.items()}
        got = run(lambda t: call(t, options), {n: v[at] for n, v in t.items()}, part)
        found.append((sample, {n: r[at] for n, r in results.items()}, got))
    return found


def pair(
    name: str, inputs: Inputs, dtypes: tuple, *, quick: bool = False, uses: tuple[str, ...] = OUTS, **options: Any
) -> list[Case]:
    """The same inputs judged forward and backward."""
    return [
        Case("attn", "joint_attention", name, dtypes, prepared(inputs, False, uses, options), quick),
        Case("attn", "joint_attention_backward", name, dtypes, prepared(inputs, True, uses, options), quick),
    ]


# -- cases ------------------------------------------------------------------------------------------------------------

JOINT = Inputs()
WIDE = SAME[:2]  # in 16 bits model code spreads a NaN, and is no bar
SOME = ((23, 0, 7), (40, 11, 1))
NONE_OF_A_SAMPLE = ((5, 0, 7), (9, 0, 40))
OUT_OF_RANGE = ((-4, 24, 1000), None)
# Next to the edges of tiles and blocks, in either stream; the law for fp32 wants some hundred rows.
LENGTHS_OF_STREAMS = ((1, 256), (16, 240), (64, 64), (65, 63), (77, 257), (255, 1), (154, 130))

CASES = [
    *pair("flux", JOINT.but(D=128, T=(64, 100), H=2, G=2), SAME, quick=True),
    *pair("sd3", JOINT.but(D=64, T=(77, 64)), SAME, quick=True),
    *[c for t in LENGTHS_OF_STREAMS for c in pair("T{}_{}".format(*t), JOINT.but(T=t, B=max(3, 512 // sum(t)), H=2, G=2), FEW)],
    *[c for d in (8, 24, 64, 88, 256) for c in pair(f"D{d}", JOINT.but(D=d), FEW)],
    # of two keys the gradient of a logit is a difference of near numbers, one of them a product with the rounded output
    pair("T1_1", JOINT.but(T=(1, 1), B=64), SAME)[0],
    *pair("cross", JOINT.but(S=(50, 3)), SAME),
    *[c for g in (1, 2) for c in pair(f"groups_{g}", JOINT.but(G=g), FEW, quick=g == 2)],
    *pair("scale", JOINT, FEW, scale=0.3),
    *pair("key_lengths", JOINT.but(key_lengths=SOME, values=padding_of_nan(*SOME)), SAME, quick=True),
    *pair("key_lengths_first", JOINT.but(key_lengths=(SOME[0], None), integers=torch.int64), FEW),
    *pair("key_lengths_second", JOINT.but(key_lengths=(None, SOME[1]), G=2), FEW),
    *pair("no_key_of_a_sample", JOINT.but(key_lengths=NONE_OF_A_SAMPLE, values=padding_of_nan(*NONE_OF_A_SAMPLE)), FEW),
    *pair("key_lengths_out_of_range", JOINT.but(key_lengths=OUT_OF_RANGE), FEW),
    *[c for n, change in LAYOUTS.items() for c in pair(n, JOINT.but(layout=change), FEW)],
    *[c for n in OUTS for c in pair(f"only_{n}", JOINT, FEW, uses=(n,))],
    *[c for v in ("nan", "inf") for c in pair(v, JOINT.but(values=spoiled(float(v))), WIDE)],
    *pair("no_samples", JOINT.but(B=0), FEW),
    *[c for t in ((0, 40), (23, 0), (0, 0)) for c in pair("T{}_{}".format(*t), JOINT.but(T=t), FEW)],
    *[c for s in ((0, 40), (23, 0), (0, 0)) for c in pair("S{}_{}".format(*s), JOINT.but(S=s), FEW)],
]  # fmt: skip
