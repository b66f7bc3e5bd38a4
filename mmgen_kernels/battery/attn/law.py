"""How a case of the family is judged.

The laws: results and gradients by the tolerance of battery/tolerance.py, against fp64 autograd of the formula; the same bits in
every run, on any number of threads and, of a sample, whatever the batch around it; inputs are never written.

The bar is the formula in the dtype, which rounds logits and weights. SDPA would be none: of two fused kernels of one accuracy
either may be the nearer one, and a bar of 1.0x its error would hang on luck. torch's kernels behind our operator (`torch`) promise
no bits across batches and threads, and their exponential in 16 bits has 20: what they give must pass this bar or err no more
than they do when called by their own names. The reference
multiplies a packed batch as a whole, which has other bits than its sequences alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmgen_kernels as mk
from mmgen_kernels import backends
from mmgen_kernels.battery import Case, Outcome, tolerance
from mmgen_kernels.battery.draws import randn
from mmgen_kernels.battery.laws import Tensors, changed_by_threads, differences, repeats, written
from mmgen_kernels.library import OPERATORS

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor]]
FLOATS = ("q", "k", "v", "bias")


def call(t: Tensors, options: dict[str, Any]) -> Tensors:
    """The public function; its outputs by name."""
    out, lse = mk.attention(**t, **options, return_lse=True)  # type: ignore[arg-type]
    return {"out": out, "lse": lse}


# -- the formula, exact and in a dtype ------------------------------------------------------------------------------------
# All take (B, H, T, D), twice (B, G, S, D) and a bias that broadcasts to (B, H, T, S).


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (s.repeat_interleave(q.shape[1] // s.shape[1], 1) for s in (k, v))
    logits = scale * q @ k.mT
    logits = logits if bias is None else logits + bias
    if causal:
        logits = logits.masked_fill(later_keys(q, k), -torch.inf)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(blind, 0)
    return logits.softmax(-1).masked_fill(blind, 0) @ v, logits.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)


def model_code(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The formula as it is written in q's dtype, lse in fp32 at least."""
    out, _ = formula(q, k, v, None if bias is None else bias.to(q.dtype), causal, scale)
    logits = (scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).to(torch.promote_types(q.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    logits = logits.masked_fill(later_keys(q, k), -torch.inf) if causal else logits
    blind = (logits == -torch.inf).all(-1)
    return out, logits.masked_fill(blind.unsqueeze(-1), 0).logsumexp(-1).masked_fill(blind, -torch.inf)


def torch_code(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's own attention; its lse is not public but for this."""
    mask = None if bias is None else bias.detach().to(q.dtype)
    if causal and mask is not None:
        mask, causal = mask.masked_fill(later_keys(q, k), -torch.inf), False
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True), lse


def later_keys(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[-2]) > torch.arange(q.shape[-2])[:, None]


def piece_by_piece(attend: Attend, t: Tensors, options: dict[str, Any]) -> Tensors:
    """`attend` on each sample or sequence, and on the keys that it may see: what is masked is not there."""
    packed = "cu_seqlens_q" in t
    q, k, v = (t[n].unsqueeze(0) if packed else t[n] for n in ("q", "k", "v"))  # (B, T, H, D), (B, S, G, D)
    B, T, H, D = q.shape
    S = k.shape[1]
    if packed:
        bounds = list(zip(t["cu_seqlens_q"].clamp(0, T).tolist(), t["cu_seqlens_k"].clamp(0, S).tolist(), strict=True))
        bounds = [(0, bounds[0][1]), *bounds, (T, bounds[-1][1])]  # queries in no sequence see no key
        spans = [(slice(0, 1), slice(a, c), slice(b, d)) for (a, b), (c, d) in itertools.pairwise(bounds)]
    elif "key_lengths" in t:
        lengths = t["key_lengths"].clamp(0, S).tolist()
        spans = [(slice(b, b + 1), slice(0, T), slice(0, length)) for b, length in enumerate(lengths)]
    else:
        spans = [(slice(0, B), slice(0, T), slice(0, S))]
    pieces = []
    for samples, queries, keys in spans:
        # (B, H, T, D) and twice (B, G, S, D)
        part = [s[samples, at].transpose(1, 2) for s, at in ((q, queries), (k, keys), (v, keys))]
        if part[0].numel() == 0 or part[1].numel() == 0:
            lse = part[0].new_full(part[0].shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
            pieces.append((part[0] * 0, lse))
            continue
        bias = t["bias"].expand(B, H, T, S)[samples, :, :, keys] if "bias" in t else None
        pieces.append(attend(part[0], part[1], part[2], bias, options.get("causal", False), options.get("scale") or D**-0.5))
    along = 2 if packed else 0
    out, lse = (torch.cat(parts, along) for parts in zip(*pieces, strict=True))
    out = out.transpose(1, 2)
    return {"out": out[0], "lse": lse[0]} if packed else {"out": out, "lse": lse}


# -- the judge --------------------------------------------------------------------------------------------------------


def run(function: Callable[[Tensors], Tensors], t: Tensors, upstream: Tensors | None) -> Tensors:
    """Outputs or, given `upstream` gradients of some of them, the gradients of every float tensor."""
    if upstream is None:
        return function(t)
    leaves = {name: t[name].detach().requires_grad_() for name in FLOATS if name in t}
    outputs = function(t | leaves)
    used = [name for name in upstream if outputs[name].requires_grad]
    weights = [upstream[name].to(outputs[name]) for name in used]
    gradients = torch.autograd.grad([outputs[name] for name in used], list(leaves.values()), weights, allow_unused=True)
    return {
        f"grad_{name}": torch.zeros_like(of) if gradient is None else gradient
        for (name, of), gradient in zip(leaves.items(), gradients, strict=True)
    }


def prepared(
    inputs: Callable[[torch.device, Any], Tensors], gradients: bool, uses: tuple[str, ...], options: dict[str, Any]
) -> Callable:
    """`prepare` of a case; `gradients`: the gradients are judged when the outputs named by `uses` are differentiated."""

    def prepare(device: torch.device, dtypes):
        t = inputs(device, dtypes)
        on_cpu = {name: v.detach().cpu().clone() for name, v in t.items()}
        exact = {name: v.double() if name in FLOATS else v for name, v in on_cpu.items()}
        upstream = None
        if gradients:
            outputs = piece_by_piece(formula, exact, options)
            upstream = {n: randn(*outputs[n].shape, seed=90 + i) for i, n in enumerate(uses)}
            if "lse" in upstream:  # nothing flows into what no key made
                upstream["lse"] = upstream["lse"].masked_fill(outputs["lse"] == -torch.inf, 0)
            upstream = {n: g.to(t["q"].dtype).double() for n, g in upstream.items()}
        truth = run(lambda t: piece_by_piece(formula, t, options), exact, upstream)
        plain = run(lambda t: piece_by_piece(model_code, t, options), on_cpu, upstream)
        on_cpu_upstream = upstream
        if upstream is not None:
            upstream = {name: gradient.to(device) for name, gradient in upstream.items()}

        def by_torch() -> Tensors:
            return run(lambda t: piece_by_piece(torch_code, t, options), on_cpu, on_cpu_upstream)

        def once() -> Tensors:
            return run(lambda t: call(t, options), t, upstream)

        def judge() -> Outcome:
            results, failures, worst = once(), [], 0.0
            implementation = backends.choose(OPERATORS["attention"], "attn", device.type)
            for name, result in results.items():
                error, failure = tolerance.failure(name, result, plain[name], truth[name])
                if failure and implementation == "torch":
                    error, failure = tolerance.failure(name, result, by_torch()[name], truth[name])
                worst = max(worst, error)
                failures += [failure] if failure else []
            failures += written(t, on_cpu)
            if implementation != "torch":
                if implementation != "reference" or "cu_seqlens_q" not in t:
                    failures += differences("alone it differs:", lone_pieces(t, options, upstream, results))
                failures += changed_by_threads(device, results, once)
            return Outcome(worst, repeats(results, once), tuple(failures))

        return judge

    return prepare


def pair(
    name: str, inputs: Callable, dtypes: tuple, *, quick: bool = False, uses: tuple[str, ...] = ("out",), **options: Any
) -> list[Case]:
    """The same inputs judged forward and backward."""
    return [
        Case("attn", "attention", name, dtypes, prepared(inputs, False, uses, options), quick),
        Case("attn", "attention_backward", name, dtypes, prepared(inputs, True, uses, options), quick),
    ]


def lone_pieces(t: Tensors, options: dict, upstream: Tensors | None, results: Tensors) -> list:
    """What a sample or sequence has for itself, in the batch and alone: outputs, and gradients of what it does not share."""
    found = []
    if "cu_seqlens_q" in t:
        bounds_q, bounds_k = (t[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k"))
        spans = [(slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])) for i in range(len(bounds_q) - 1)]
        for queries, keys in spans[:4]:
            where = {"q": queries, "k": keys, "v": keys, "out": queries, "grad_q": queries, "grad_k": keys, "grad_v": keys}
            alone = {n: t[n][where[n]].unsqueeze(0) for n in ("q", "k", "v")}
            part = None if upstream is None else {n: pick(n, g, where).unsqueeze(0) for n, g in upstream.items()}
            got = {n: r.squeeze(0) for n, r in run(lambda a: call(a, options), alone, part).items()}
            found.append((f"queries {queries}", {n: pick(n, results[n], where) for n in got}, got))
        return found
    B = len(t["q"])
    own = [n for n, v in t.items() if n != "bias" or v.shape[0] > 1]
    for sample in {0, B - 1} if B > 1 else ():
        alone = t | {n: t[n][sample : sample + 1] for n in own}
        part = None if upstream is None else {n: g[sample : sample + 1] for n, g in upstream.items()}
        got = run(lambda a: call(a, options), alone, part)
        compared = [n for n in got if n.removeprefix("grad_") in (*own, "out", "lse")]
        found.append((f"sample {sample}", {n: results[n][sample : sample + 1] for n in compared}, {n: got[n] for n in compared}))
    return found


def pick(name: str, tensor: Tensor, where: dict[str, slice]) -> Tensor:
    return tensor[:, where["out"]] if name == "lse" else tensor[where[name]]
