"""diffusers' transformer models with their blocks patched: outputs, gradients, checkpointing, reverting."""

import pytest
import torch
from block_cases import assert_same, operator_calls, results
from test_diffusers_models import dit, flux, sd35
from torch import nn

import mmgen_kernels as mk


def pixart(diffusers):
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([3, 7]), "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }  # fmt: skip


def latte(diffusers):
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
        attention_bias=True, cross_attention_dim=16, caption_channels=12, activation_fn="gelu-approximate", video_length=3,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([3, 7]),
    }  # fmt: skip


def lumina2(diffusers):
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 8, 4), axes_lens=(30, 16, 16), cap_feat_dim=12,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }  # fmt: skip


MODELS = {dit: 2, pixart: 2, latte: 4, sd35: 2, flux: 2, lumina2: 4}  # and how many blocks each has


@pytest.fixture(params=MODELS, ids=lambda build: build.__name__)
def built(request):
    torch.manual_seed(0)
    model, inputs = request.param(pytest.importorskip("diffusers"))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    inputs["hidden_states"].requires_grad_()
    return model, inputs, MODELS[request.param]


def blocks_of(handle):
    return [r for r in handle.replaced if r.kind.endswith("TransformerBlock")]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_in_a_model(built, dtype):
    model, inputs, count = built
    model.to(dtype)
    inputs = {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    inputs["hidden_states"].requires_grad_()
    expected = results(model, inputs, call=lambda **given: model(**given, return_dict=False))
    with mk.patch(model, strict=True) as handle:
        assert len(blocks_of(handle)) == count and all(r.verified for r in blocks_of(handle))
        calls = operator_calls(model, inputs)
        assert calls.get("attention", 0) + calls.get("joint_attention", 0) >= count
        found = results(model, inputs, call=lambda **given: model(**given, return_dict=False))
        assert_same(found, expected, tolerance=None if dtype == torch.float32 else 0.1)
    after = results(model, inputs, call=lambda **given: model(**given, return_dict=False))
    for name, of in expected.items():
        assert after[name] is None if of is None else torch.equal(after[name], of)
    assert operator_calls(model, inputs) == {}


def test_checkpointing_and_compile(built):
    model, inputs, _ = built
    expected = results(model, inputs)
    mk.patch(model, strict=True)
    model.enable_gradient_checkpointing()
    assert_same(results(model, inputs), expected)
    model.disable_gradient_checkpointing()
    for block in model.modules():
        if type(block).__name__.endswith("TransformerBlock"):
            block.compile(fullgraph=True, backend="aot_eager")
    assert_same(results(model, inputs), expected)


def fused_projections(model):
    model.fuse_qkv_projections()


def other_processors(model):
    processors = {n: type("Mine", (type(p),), {})() for n, p in model.attn_processors.items()}
    model.set_attn_processor(processors)


def chosen_backend(model):
    model.set_attention_backend("native")


def layerwise_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def hooks_of_a_part(model):
    for module in model.modules():
        if type(module).__name__ == "FeedForward":
            module.register_forward_hook(lambda *_: None)


SWITCHES = (fused_projections, other_processors, chosen_backend, layerwise_casting, hooks_of_a_part)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.__name__)
@pytest.mark.parametrize("build", (flux, sd35), ids=lambda build: build.__name__)
def test_what_the_library_switches_is_heard(build, switch):
    """After patching: the blocks run the library's code then, with its result."""
    if build is sd35 and switch in (chosen_backend, fused_projections):
        pytest.skip("its processor has no backends, and that of fused projections knows no attention of the image alone")
    sides = []
    for patched in (False, True):
        torch.manual_seed(0)
        model, inputs = build(pytest.importorskip("diffusers"))
        if patched:
            mk.patch(model, strict=True, families="blocks")
        switch(model)
        sides.append(model(**inputs).sample)
    torch.testing.assert_close(*sides)
    calls = operator_calls(model, inputs)
    single = build is flux and switch is hooks_of_a_part  # FLUX's second kind of block has no such part
    assert calls.get("joint_attention", 0) == 0 and calls.get("attention", 0) == single
