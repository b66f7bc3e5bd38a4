"""Attention and feed-forward layers inside diffusers' transformer blocks: what they compute, and whether it is known here.

The package's `Attention` and `FluxAttention` leave the work to a processor, which anyone may exchange: a rule goes by its class.
Projections are called as they are; between them, norms, rotary embedding, attention and MLP are operators that read views of the
projections in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

import mmgen_kernels as mk
from mmgen_kernels.patching.dit import bias_of, kind_of, linear_reasons, norm_reasons
from mmgen_kernels.patching.rule import Forward

OWN = ("to_q", "to_k", "to_v", "norm_q", "norm_k")  # an attention's parts for the stream that it belongs to
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")  # and for the text beside it
# of `Attention`, with the values by which processors do nothing more than they have to
DEFAULTS = {
    "group_norm": None, "spatial_norm": None, "norm_cross": None, "residual_connection": False, "rescale_output_factor": 1.0,
    "scale_qk": True,
}  # fmt: skip


# -- what may change from call to call --------------------------------------------------------------------------------


def is_as_written(module: nn.Module) -> bool:
    """Whether below it nobody listens, nobody has put a forward of their own, and no dropout is active.

    Asked in every call: 47 parts in 15 us, where `modules()` and a look at each attribute take 50.
    """
    parts = list(module._modules.values())
    for part in parts:  # which grows
        if part is None:
            continue
        held = vars(part)
        if held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
            return False
        if "forward" in held and not isinstance(held["forward"], Forward):
            return False
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            return False
        parts += part._modules.values()
    return True


def is_run_by(attn: Any, processor: str) -> bool:
    """Whether the attention is the processor's own: with its projections apart, on one device, by no kernel of a user's choice."""
    found = getattr(attn, "processor", None)
    chosen = (getattr(found, "_attention_backend", None), getattr(found, "_parallel_config", None))
    return type(found).__name__ == processor and chosen == (None, None) and not getattr(attn, "fused_projections", False)


def linears_of(part: Any) -> list[Any]:
    """The projections of an attention or of a feed-forward."""
    if "net" in part._modules:
        return [part.net[0].proj, part.net[2]]
    out = part._modules.get("to_out")
    return present(part, (*OWN[:3], *ADDED[:3], "to_add_out")) + ([] if out is None else [out[0]])


def present(module: nn.Module, names: tuple[str, ...]) -> list[Any]:
    return [part for part in map(module._modules.get, names) if part is not None]


# -- what they compute ------------------------------------------------------------------------------------------------


def projected(attn: Any, x: Tensor, names: tuple[str, ...] = OWN, **rope: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of x (B, T, D): (B, T, heads, head_dim), grouped-query heads of k and v fewer."""
    parts: list[Any] = [getattr(attn, name, None) for name in names]
    *projections, norm_q, norm_k = parts
    head_dim = head_dim_of(attn)
    q, k, v = (project(x).unflatten(-1, (-1, head_dim)) for project in projections)
    if norm_q is not None:
        affine = {"q_weight": norm_q.weight, "k_weight": norm_k.weight, "q_bias": bias_of(norm_q), "k_bias": bias_of(norm_k)}
        q, k = mk.qk_norm_rope(q, k, norm=kind_of(norm_q), eps=norm_q.eps, **affine, **rope)
    elif rope:
        q, k = mk.qk_norm_rope(q, k, norm=None, **rope)
    return q, k, v


def attended(attn: Any, x: Tensor, bias: Tensor | None = None, **rope: Any) -> Tensor:
    """x (B, T, D) to itself, and the projection after it."""
    return attn.to_out[0](mk.attention(*projected(attn, x, **rope), bias=bias).flatten(2))


def attended_across(attn: Any, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, T, D) to context (B, S, C)."""
    head_dim = head_dim_of(attn)
    q, k, v = (p(t).unflatten(-1, (-1, head_dim)) for p, t in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context)))
    return attn.to_out[0](mk.attention(q, k, v, bias=bias).flatten(2))


def head_dim_of(attn: Any) -> int:
    return attn.to_q.out_features // attn.heads


def modulated(norm: Any, x: Tensor, shift: Any, scale: Any) -> Any:
    return mk.adaln(x, shift, scale, norm=str(kind_of(norm)), weight=norm.weight, bias=bias_of(norm), eps=norm.eps)


def fed_forward(ff: Any, norm: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * ff(norm(x) * (1 + scale) + shift)``."""
    first, second = linears_of(ff)
    return mk.adaln_mlp(
        x, shift, scale, gate, first.weight, first.bias, second.weight, second.bias, activation=GELUS[ff.net[0].approximate],
        norm=str(kind_of(norm)), weight=norm.weight, bias=bias_of(norm), eps=norm.eps,
    )  # fmt: skip


GELUS = {"tanh": "gelu_tanh", "none": "gelu"}


# -- why they are not served ------------------------------------------------------------------------------------------


def attention_reasons(name: str, attn: Any, processor: str, normed: bool = True, joint: bool = False) -> Iterator[str]:
    """Why an attention is not one that `projected` and operators compute.

    `normed`: norms of queries and keys are known; `joint`: it has projections for the text.
    """
    projections = (*OWN[:3], *ADDED[:3]) if joint else OWN[:3]
    missing = [n for n in projections if not isinstance(getattr(attn, n, None), nn.Module)]
    if missing:
        yield f"{name} has no {', '.join(missing)}"
        return
    if not is_run_by(attn, processor):
        yield f"{name} is run by {type(getattr(attn, 'processor', None)).__name__} in a way that is not known here"
    changed = [f"{option}={getattr(attn, option)}" for option, usual in DEFAULTS.items() if getattr(attn, option, usual) != usual]
    if changed:
        yield f"{name} has {', '.join(changed)}"
    out = getattr(attn, "to_out", None)
    if out is not None and not (isinstance(out, nn.ModuleList) and len(out) == 2 and isinstance(out[1], nn.Dropout)):
        yield f"{name}.to_out is not a projection and a dropout"
        return
    yield from (f"{name}: {type(p).__name__} instead of nn.Linear" for p in linears_of(attn) if type(p) is not nn.Linear)
    heads, width = getattr(attn, "heads", 0), getattr(attn.to_q, "out_features", 0)
    if not heads or width % (8 * heads) or width // heads > 256:
        yield f"{name} has {heads} heads in {width} channels, not heads of a multiple of 8 channels, up to 256"
        return
    for names in (OWN, ADDED):
        norms: list[Any] = [getattr(attn, n, None) for n in names[3:]]
        if norms[0] is None and norms[1] is None:
            continue
        kinds = [(type(norm), getattr(norm, "eps", None)) for norm in norms]
        if not normed or kinds[0] != kinds[1]:
            yield f"{name} has {names[3]} {norms[0]} and {names[4]} {norms[1]}"
        else:
            yield from (r for n, norm in zip(names[3:], norms, strict=True) for r in norm_reasons(n, norm, width // heads))


def feed_forward_reasons(name: str, ff: Any, dim: int) -> list[str]:
    """Why a feed-forward is not ``Linear(gelu(Linear(x)))``, with dropouts or without."""
    net: list[Any] = list(getattr(ff, "net", []))
    if len(net) < 3 or not all(isinstance(part, nn.Dropout) for part in (net[1], *net[3:])):
        return [f"{name} is not a projection, a dropout and a projection"]
    first, _, last = net[:3]
    if type(first).__name__ != "GELU" or getattr(first, "approximate", None) not in GELUS or not hasattr(first, "proj"):
        return [f"{name}.net.0 is a {type(first).__name__}, not a projection and a GELU"]
    if type(last) is not nn.Linear or last.out_features != dim:
        return [f"{name}.net.2 is {last}, not an nn.Linear to {dim} channels"]
    return linear_reasons(first, proj=(last.in_features, dim))
