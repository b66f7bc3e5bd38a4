"""mk.patch on diffusers' normalization layers: by twins of their structure, and by themselves where they are installed."""

import copy

import pytest
import torch
import twins_normalization as twins
from normalization_cases import (
    CASES,
    DTYPES,
    MODULATED,
    PLAIN,
    B,
    D,
    T,
    arguments,
    assert_same,
    make,
    operator_calls,
    patched,
    results,
    seeded,
    widened,
)
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import mmgen_kernels as mk
from mmgen_kernels.patching import diffusers_normalization, verification
from mmgen_kernels.patching.handle import patch_with


@pytest.fixture(params=("twin", "diffusers"))
def library(request):
    return twins if request.param == "twin" else pytest.importorskip(twins.FILE)


# -- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_served(library, case):
    module = make(library, case)
    ours = patched(module)
    assert_same(results(ours, case), results(module, case))
    streams = {"CogVideoXLayerNormZero": 2, "CogView3Plus": 2, "FP32LayerNorm": 0}  # PyTorch's own is as fast in fp32
    assert operator_calls(ours, *arguments(case)) == streams.get(case, 1)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_dtypes(library, case, dtypes):
    """Stock's dtypes, and no further from the numbers of fp64 than stock."""
    dtype, x_dtype = DTYPES[dtypes]
    if dtypes.endswith("x") and "Continuous" in case:
        pytest.skip("stock casts the conditioning to x's dtype, and its Linear then refuses it")
    module = make(library, case, dtype)
    if dtypes == "fp32 x" and isinstance(getattr(module, "norm", None), nn.LayerNorm) and module.norm.weight is not None:
        pytest.skip("stock refuses a half weight for fp32 x")
    given = arguments(case, dtype, x_dtype=x_dtype)
    found, expected = results(patched(module), case, given), results(module, case, given)
    if dtype == torch.float64:  # some of stock's norms are fp32 inside
        narrow = "RMS" in type(getattr(module, "norm", module)).__name__ or "FP32" in type(getattr(module, "norm", module)).__name__
        return assert_same(found, expected, *((1e-5, 1e-6) if narrow else (1e-11, 1e-12)))
    wide = torch.utils._pytree.tree_map(widened, given)
    exact = results(make(library, case, dtype).double(), case, wide)
    for a, b, truth in zip(found, expected, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        scale = float(truth.abs().max()) * torch.finfo(a.dtype).eps / 4  # a tensor of few elements may be exact by luck
        assert (a.double() - truth).square().mean().sqrt() <= (b.double() - truth).square().mean().sqrt() + scale


@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", CASES)
def test_dtypes_under_autocast(library, case, x_dtype):
    module = make(library, case)
    args, kwargs = arguments(case, x_dtype=x_dtype)
    ours = patched(module)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (seeded(side, args, kwargs) for side in (ours, module))
    assert [o.dtype for o in found] == [o.dtype for o in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("case", (*PLAIN, "AdaLayerNormZero", "AdaLayerNormContinuous", "LuminaRMSNormZero", "CogView3Plus"))
@pytest.mark.filterwarnings("ignore:mmgen_kernels.adaln runs as plain PyTorch on cuda")
def test_dtypes_on_cuda(case, autocast, x_dtype):
    """Without values, so without a GPU: there autocast widens layer norms to fp32, unlike the CPU's."""
    module = make(twins, case)
    ours = patched(module)
    if x_dtype != torch.float32 and not autocast and "Continuous" in case:
        pytest.skip("stock's Linear refuses it")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        tensors = torch.utils._pytree.tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), arguments(case))
        (x,), kwargs = tensors
        weights = {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") for k, v in module.state_dict().items()}
        torch.set_autocast_enabled("cuda", autocast)  # torch.autocast itself asks for a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            found, expected = (tree_leaves(torch.func.functional_call(m, weights, x.to(x_dtype), kwargs)) for m in (ours, module))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert [(o.dtype, o.shape) for o in found] == [(o.dtype, o.shape) for o in expected]


@pytest.mark.parametrize("case", MODULATED)
def test_shapes_that_broadcast(library, case):
    """One sample for several vectors, one vector for several samples, no samples, tokens without a batch, four dimensions."""
    module = make(library, case)
    ours = patched(module)
    for shape in ((1, T, D), (0, T, D), (T, D), (2, B, T, D)):
        (x,), kwargs = arguments(case, x=shape)
        outcomes = []
        for side in (ours, module):
            try:
                outcomes.append(seeded(side, (x,), kwargs))
            except Exception as error:
                outcomes.append([type(error)])
        if isinstance(outcomes[1][0], type):
            assert outcomes[0] == outcomes[1]
        else:
            assert_same(*outcomes)
    if case in ("AdaLayerNormZeroSingle", "AdaLayerNormContinuous"):
        (x,), kwargs = arguments(case)
        one = {name: value[:1] for name, value in kwargs.items()}
        assert_same([tree_leaves(ours(x, **one))[0]], [tree_leaves(module(x, **one))[0]])
        assert operator_calls(ours, (x,), one) == 1


@pytest.mark.parametrize("case", PLAIN)
def test_plain_norms_of_any_shape(library, case):
    """As they stand on queries and keys, (B, T, H, D), and in bf16, where they are the gain."""
    module = make(library, case)
    ours = patched(module)
    for shape in ((B, T, D), (B, T, 4, D), (7, D), (D,)):
        (x,), _ = arguments(case, x=shape)
        for given in (x, x.bfloat16(), x.transpose(0, max(0, x.dim() - 2)), *([x.transpose(1, 2)] if x.dim() == 4 else [])):
            a, b = ours(given), module(hidden_states=given) if "RMS" in case else module(given)
            relative = (1e-4, 1e-5) if b.dtype == torch.float32 else (1e-2, 1e-2)
            assert_same([a], [b], *relative)
            assert a.stride() == b.stride() or given.stride(0) < given.stride(-2)
            assert operator_calls(ours, (given,), {}) == (len(shape) > 1 and (case != "FP32LayerNorm" or given.dtype != x.dtype))


@pytest.mark.parametrize("case", PLAIN)
def test_channels_of_images_stay_stock(case):
    """As autoencoders call RMSNorm: the result lies in memory as x does."""
    module = make(twins, case)
    ours = patched(module)
    x = torch.randn(B, D, 2, 3).bfloat16().movedim(1, -1)
    assert torch.equal(ours(x), module(x)) and ours(x).stride() == module(x).stride()
    assert operator_calls(ours, (x,), {}) == 0


# -- what is not ------------------------------------------------------------------------------------------------------


class Mine(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.Identity(), "norm is a Identity, not one of LayerNorm, FP32LayerNorm, RMSNorm, MochiRMSNorm"),
        (Mine(D), "norm is a Mine"),
        (nn.RMSNorm(D), "norm is a RMSNorm"),  # torch's: its eps may be None
        (parametrizations.weight_norm(nn.LayerNorm(D), dim=None), "norm is a ParametrizedLayerNorm"),
        (nn.LayerNorm((T, D)), "norm normalizes 2 dimensions"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_norms_that_are_something_else(norm, reason):
    module = make(twins, "AdaLayerNormZeroSingle")
    module.norm = norm
    handle = mk.patch(module, verify=False)
    assert not handle.replaced and handle.kept[0].reasons[0].startswith(reason)
    # put there later, it is called
    module = make(twins, "AdaLayerNormZeroSingle")
    mk.patch(module, strict=True)
    module.norm = norm
    args, kwargs = arguments("AdaLayerNormZeroSingle")
    expected = type(module).forward(module, *args, **kwargs)
    assert operator_calls(module, args, kwargs) == 0
    assert_same(module(*args, **kwargs), expected)


@pytest.mark.parametrize("case", MODULATED)
def test_hooks_are_called(library, case):
    """Those on the layer, on what makes the vectors and, by the way of stock, on the norm."""
    module = make(library, case)
    mk.patch(module, strict=True)
    args, kwargs = arguments(case)
    seen = []
    names = {name for name, child in module.named_modules() if not name or not list(child.children())}
    for name in names:
        module.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.append(name))
    assert operator_calls(module, args, kwargs) == 0
    assert set(seen) == names


def test_a_forward_on_the_norm_is_used():
    """As offloading and the like put it there."""
    module = make(twins, "AdaLayerNormZero")
    mk.patch(module, strict=True)
    module.norm.forward = torch.zeros_like
    args, kwargs = arguments("AdaLayerNormZero")
    shift = module.linear(module.silu(kwargs["emb"])).chunk(6, 1)[0]
    assert torch.equal(module(*args, **kwargs)[0], shift[:, None].expand(B, T, D))


def test_another_linear_is_used():
    """As adapters (LoRA) and quantisation put it there."""

    class Adapted(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.base_layer, self.in_features = linear, linear.in_features

        def forward(self, x):
            return self.base_layer(x) + 0.5

    for before in (True, False):
        module = make(twins, "AdaLayerNormZeroSingle")
        ours = copy.deepcopy(module)
        if not before:
            ours = patched(ours)
        for side in (module, ours):
            side.linear = Adapted(side.linear)
        ours = patched(ours) if before else ours
        assert_same(results(ours, "AdaLayerNormZeroSingle"), results(module, "AdaLayerNormZeroSingle"))
        assert operator_calls(ours, *arguments("AdaLayerNormZeroSingle")) == 1


def test_subclasses(library):
    base = library.AdaLayerNormZeroSingle

    class Own(base):
        def forward(self, x, emb=None):
            return super().forward(2 * x, emb)

    class Adding(base):
        pass

    assert mk.patch(Own(D)).kept[0].reasons == ("Own overrides AdaLayerNormZeroSingle.forward",)
    assert mk.patch(Adding(D), strict=True).replaced


def test_versions_with_other_arguments():
    @twins.named("AdaLayerNormZeroSingle")
    class Later(twins.AdaLayerNormZeroSingle):
        def forward(self, x, emb=None, rows=None):
            return super().forward(x, emb)

    assert mk.patch(Later(D)).kept[0].reasons == ("forward takes x, emb, rows, where this rule knows x, emb",)


def test_classes_of_the_same_name_elsewhere():
    elsewhere = type("RMSNorm", (nn.Module,), {"__module__": "diffusers.pipelines.kolors.text_encoder"})
    foreign = type("AdaLayerNormZero", (nn.Module,), {"__module__": "other.models.normalization"})
    for kind in (elsewhere, foreign):
        assert "no module or scheduler here is known" in mk.patch(kind()).report()


# -- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MODULATED)
def test_verification_tells_vectors_apart(case, monkeypatch):
    """Every exchange of two parts of the projection is found, though models begin with projections of zeros."""
    monkeypatch.setattr(verification, "_verified", set())
    module = make(twins, case)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    linear = "linear_1" if hasattr(module, "linear_1") else "linear"
    rule = next(rule for rule in diffusers_normalization.RULES if rule.recognises(module))

    class Rolled(nn.Linear):
        def forward(self, x):
            return super().forward(x).roll(1, -1) if getattr(self, "wrong", False) else super().forward(x)

    class Wrong(type(rule.forward(module))):
        def __call__(self, *args, **kwargs):
            getattr(self.module, linear).wrong = True
            return super().__call__(*args, **kwargs)

    getattr(module, linear).__class__ = Rolled
    wrong = copy.copy(rule)
    wrong.forward = Wrong
    handle = patch_with([wrong], module, families=None, verify=True, strict=False)
    assert "training step 1, call 1: output 0 differs" in handle.kept[0].reasons[0]
    assert not any(p.any() for p in module.parameters())
    assert patch_with([rule], module, families=None, verify=True, strict=True).replaced
