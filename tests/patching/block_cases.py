"""The transformer blocks of diffusers that the tests go through, and what they do with each."""

import copy

import pytest
import torch
import twins_blocks as twins
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import mmgen_kernels as mk
from mmgen_kernels.battery.tolerance import FACTORS

B, T, S, D, H = 2, 9, 5, 48, 3
BASIC = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
SINGLE = {**BASIC, "norm_type": "ada_norm_single"}
JOINT, FLUX = ("text", "temb"), {"qk_norm_rope": 2, "joint_attention": 1, "gate_residual": 4, "adaln_mlp": 2}
LUMINA = {"num_kv_heads": 1, "multiple_of": 32, "ffn_dim_multiplier": None, "norm_eps": 1e-5}
SANDWICH = {"adaln": 1, "qk_norm_rope": 1, "attention": 1, "gate_residual_adaln": 1, "gate_residual": 1}
ONE_ATTENTION, TWO_ATTENTIONS = ({"attention": n, "gate_residual": 2, "adaln_mlp": 1} for n in (1, 2))
# name -> class, its options, what its forward takes besides tokens, how often operators then run: adaln_mlp runs a gate_residual
CASES = {
    "dit": (
        "BasicTransformerBlock", {**BASIC, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10},
        ("timestep", "class_labels"), ONE_ATTENTION,
    ),
    "dit, erf": (
        "BasicTransformerBlock", {**BASIC, "activation_fn": "gelu", "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10},
        ("timestep", "class_labels", "attention_mask"), ONE_ATTENTION,
    ),
    "pixart": (
        "BasicTransformerBlock", {**SINGLE, "cross_attention_dim": 40}, ("text", "text_mask", "vectors"), TWO_ATTENTIONS,
    ),
    "latte": ("BasicTransformerBlock", SINGLE, ("vectors",), ONE_ATTENTION),
    "sd3": ("JointTransformerBlock", {}, JOINT, {"joint_attention": 1, "gate_residual": 4, "adaln_mlp": 2}),
    "sd3.5, dual": (
        "JointTransformerBlock", {"qk_norm": "rms_norm", "use_dual_attention": True}, JOINT,
        {"qk_norm_rope": 3, "joint_attention": 1, "attention": 1, "gate_residual": 5, "adaln_mlp": 2},
    ),
    "sd3.5, last": (
        "JointTransformerBlock", {"qk_norm": "rms_norm", "context_pre_only": True}, JOINT,
        {"qk_norm_rope": 2, "joint_attention": 1, "gate_residual": 2, "adaln_mlp": 1},
    ),
    "flux": ("FluxTransformerBlock", {}, (*JOINT, "tables"), FLUX), "flux, no rope": ("FluxTransformerBlock", {}, JOINT, FLUX),
    "flux single": (
        "FluxSingleTransformerBlock", {}, (*JOINT, "tables"),
        {"adaln": 1, "qk_norm_rope": 1, "attention": 1, "gate_residual": 1},
    ),
    "lumina2": ("Lumina2TransformerBlock", LUMINA, ("rotations", "temb"), SANDWICH),
    "lumina2, mask": ("Lumina2TransformerBlock", LUMINA, ("seen", "rotations", "temb"), SANDWICH),
    "lumina2, text": ("Lumina2TransformerBlock", {**LUMINA, "modulation": False}, ("seen", "rotations"), SANDWICH),
}  # fmt: skip
FILES = {
    "Lumina2TransformerBlock": "diffusers.models.transformers.transformer_lumina2",
    "BasicTransformerBlock": "diffusers.models.attention",
    "JointTransformerBlock": "diffusers.models.attention",
    "FluxTransformerBlock": "diffusers.models.transformers.transformer_flux",
    "FluxSingleTransformerBlock": "diffusers.models.transformers.transformer_flux",
}
TINY = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest value


def make(library, case, dtype=torch.float32, **options):
    """With weights of which none is like another: models begin with zeros and ones."""
    name, usual, _, _ = CASES[case]
    source = twins if library == "twin" else pytest.importorskip(FILES[name])
    sizes = (D, H) if name == "Lumina2TransformerBlock" else (D, H, D // H)
    block = getattr(source, name)(*sizes, **usual, **options)
    torch.manual_seed(0)
    for parameter in dict(sorted(block.named_parameters())).values():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    return block.to(dtype)


def arguments(case, dtype=torch.float32, seed=1):
    """What forward takes, by name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    width = CASES[case][1].get("cross_attention_dim", D)
    given = {
        "timestep": ("timestep", torch.arange(B)),
        "class_labels": ("class_labels", torch.arange(B)),
        "attention_mask": ("attention_mask", draw(B, 1, T).detach()),
        "vectors": ("timestep", draw(B, 6 * D)),
        "text": ("encoder_hidden_states", draw(B, S, width)),
        "temb": ("temb", draw(B, D)),
        "tables": ("image_rotary_emb", tables(draw(S + T, D // H // 2).detach())),
        "seen": ("attention_mask", (torch.arange(B)[:, None] + torch.arange(T)) % 3 > 0),
        "rotations": ("image_rotary_emb", torch.polar(torch.ones(B, T, D // H // 2), draw(B, T, D // H // 2).detach().float())),
        "text_mask": ("encoder_attention_mask", draw(B, 1, S).detach()),
    }
    empty = {"attention_mask": None} if "rotations" in CASES[case][2] else {}
    return {"hidden_states": draw(B, T, D), **empty, **dict(given[name] for name in CASES[case][2])}


def tables(angles):
    """Each angle twice, in fp32 beside any tokens."""
    angles = angles.to(torch.promote_types(angles.dtype, torch.float32)).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def weighted(outputs):
    """The outputs, and a number that depends on all of their elements."""
    outputs = [o for o in tree_leaves(outputs) if o is not None]
    generator = torch.Generator().manual_seed(2)
    return outputs, sum((o.double() * torch.randn(o.shape, generator=generator).double()).sum() for o in outputs)


def results(block, given, call=None):
    """Outputs, and the gradients of inputs and parameters, by name."""
    torch.manual_seed(3)  # of dropped labels
    outputs, total = weighted((block if call is None else call)(**given))
    leaves = {name: t for name, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    leaves |= {name: p for name, p in block.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return named_results(outputs, dict(zip(leaves, gradients, strict=True)))


def accumulated(block, given, call=None):
    """The same by backward(), which is all that some wrappers know."""
    torch.manual_seed(3)
    given = {n: t.detach().requires_grad_() if getattr(t, "requires_grad", False) else t for n, t in given.items()}
    outputs, total = weighted((block if call is None else call)(**given))
    total.backward()
    gradients = {n: t.grad for n, t in given.items() if getattr(t, "requires_grad", False)}
    for name, parameter in block.named_parameters():
        gradients[name] = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    return named_results(outputs, gradients)


def named_results(outputs, gradients):
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | gradients


def beyond_the_law(found, expected, truth):
    """What is further from fp64 than plain PyTorch, of several draws: the law of battery/tolerance.py, with the rms over all of
    them and the mean of their maxima, as the largest error of all is one number and a matter of luck."""
    told = []
    for name, exact in truth.items():
        error, plain = (side[name].double() - exact for side in (found, expected))  # (draws, ...)
        rounding = exact.to(found[name].dtype).double() - exact
        rms_factor, max_factor = FACTORS[found[name].dtype]
        rms = [e.square().mean().sqrt() for e in (error, plain, rounding)]
        largest = [e.abs().flatten(1).amax(1).mean() for e in (error, plain, rounding)]
        if rms[0] > (1 + 1e-9) * max(rms_factor * rms[1], rms[2]):
            told.append(f"{name}: rms {rms[0]:.3g}, plain {rms[1]:.3g}")
        if found[name].dtype == torch.float32 and largest[0] > (1 + 1e-9) * max(max_factor * largest[1], largest[2]):
            told.append(f"{name}: maximum {largest[0]:.3g}, plain {largest[1]:.3g}")
    return told


def patched(block):
    ours = copy.deepcopy(block)
    handle = mk.patch(ours, families="blocks", strict=True)
    assert [r.name for r in handle.replaced] == [type(block).__name__] and handle.replaced[0].verified
    return ours


def widened(given):
    def wide(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return tree_map(wide, given)


def operator_calls(block, given):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block(**given)
    names = [event.name.removeprefix("mmgen_kernels::") for event in profile.events() if event.name.startswith("mmgen_kernels::")]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def vanishes(name):
    """What is added to all keys adds the same to all logits of a query: the gradient is 0 but for roundings."""
    return name.endswith(("attn1.to_k.bias", "attn2.to_k.bias"))


def served(block, given, case):
    """Whether all operators of the case run."""
    calls = operator_calls(block, given)
    return all(calls.get(name) == count for name, count in CASES[case][3].items())


def assert_same(found, expected, tolerance=None):
    assert found.keys() == expected.keys()
    of_all = max(float(of.abs().max()) for of in expected.values() if of is not None)
    for name, of in expected.items():
        got = found[name]
        assert (got is None) == (of is None), name
        if of is None:
            continue
        assert (got.shape, got.dtype) == (of.shape, of.dtype), name
        largest = of_all if vanishes(name) else float(of.abs().max())
        assert float((got.double() - of.double()).abs().max()) <= (tolerance or TINY[of.dtype]) * largest, name
