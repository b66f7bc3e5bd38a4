"""diffusers' normalization layers in their life: in blocks and models, reverted, copied, checkpointed, compiled."""

import copy

import pytest
import torch
import twins_normalization as twins
from normalization_cases import CASES, C, arguments, assert_same, make, operator_calls, patched
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm_q = make(twins, "AdaLayerNormZero, fp32"), make(twins, "RMSNorm")
        self.norm_out = make(twins, "AdaLayerNormContinuous")

    def forward(self, x, emb):
        x = self.norm_q(self.norm1(x, emb=emb)[0])
        return self.norm_out(x, emb[:, :C])


def block_inputs():
    (x,), kwargs = arguments("AdaLayerNormZero")
    return x, kwargs["emb"]


def test_revert_to_the_bit():
    block = Block()
    before = {name: dict(vars(child)) for name, child in block.named_modules()}
    stock, keys = block(*block_inputs()), list(block.state_dict())
    with mk.patch(block, strict=True) as handle:
        assert [r.name for r in handle.replaced] == ["norm1", "norm1.norm", "norm_q", "norm_out"]
        assert "replaced norm1 (AdaLayerNormZero) by mk.adaln, verified" in handle.report()
        assert list(block.state_dict()) == keys
        torch.testing.assert_close(block(*block_inputs()), stock)
        assert operator_calls(block, block_inputs(), {}) == 3  # norm1.norm's is part of norm1's
    assert torch.equal(block(*block_inputs()), stock)
    assert {name: dict(vars(child)) for name, child in block.named_modules()} == before


def test_families():
    assert "no module or scheduler here is known" in mk.patch(Block(), families="vq").report()
    assert len(mk.patch(Block(), families="modulation").replaced) == 4


def test_a_copy_serves_itself():
    module = make(twins, "AdaLayerNormZeroSingle")
    mk.patch(module, strict=True)
    twin = copy.deepcopy(module)
    nn.init.zeros_(twin.linear.weight)
    nn.init.zeros_(twin.linear.bias)
    args, kwargs = arguments("AdaLayerNormZeroSingle")
    torch.testing.assert_close(twin(*args, **kwargs)[0], twin.norm(args[0]))
    assert module(*args, **kwargs)[1].any() and not twin(*args, **kwargs)[1].any()


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(reentrant):
    block = Block()
    found = []
    with mk.patch(block, strict=True):
        for run in (block, lambda *a: checkpoint(block, *a, use_reentrant=reentrant)):
            x, emb = block_inputs()
            run(x, emb).square().sum().backward()
            found.append([x.grad, emb.grad, *(p.grad.clone() for p in block.parameters())])
            block.zero_grad()
    assert_same(*found, relative=0, of_largest=0)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("case", [case for case in CASES if "," not in case or "labels" in case])
def test_compiled_as_one_graph(case):
    module = make(twins, case)
    ours = patched(module)
    compiled = torch.compile(lambda *a, **k: ours(*a, **k), fullgraph=True, backend="aot_eager")
    args, kwargs = arguments(case)
    if "labels" in case:
        ours.eval()
    assert_same(tree_leaves(compiled(*args, **kwargs)), tree_leaves(ours(*args, **kwargs)))


# -- the library's models ---------------------------------------------------------------------------------------------


def dit(diffusers):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}


def flux(diffusers):
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 3, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.5, 0.2]), "img_ids": torch.randn(6, 3),
        "txt_ids": torch.randn(3, 3),
    }  # fmt: skip


def sd35(diffusers):
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=32, pooled_projection_dim=64, out_channels=4, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 32),
        "pooled_projections": torch.randn(2, 64), "timestep": torch.tensor([5, 9]),
    }  # fmt: skip


def cogvideox(diffusers):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=5,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 3, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8),
        "timestep": torch.tensor([5, 9]),
    }  # fmt: skip


@pytest.mark.parametrize("build", (dit, flux, sd35, cogvideox))
def test_in_a_model(build):
    torch.manual_seed(0)
    model, inputs = build(pytest.importorskip("diffusers"))
    model.eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    stock = model(**inputs).sample
    with mk.patch(model, strict=True, families="modulation") as handle:
        assert operator_calls(model, (), inputs) >= 2
        assert {"dit": "AdaLayerNormZero", "flux": "AdaLayerNormZeroSingle", "sd35": "SD35AdaLayerNormZeroX"}.get(
            build.__name__, "CogVideoXLayerNormZero"
        ) in {r.kind for r in handle.replaced}
        torch.testing.assert_close(model(**inputs).sample, stock, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**inputs).sample, stock)
