"""mk.patch on the blocks and final layers of scripts that follow DiT, by a twin of their structure."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins_dit import DiT, DiTBlock, FinalLayer, LightningDiTBlock, RMSNorm, RotaryEmbedding, drawn

import mmgen_kernels as mk
from mmgen_kernels.patching import dit, verification
from mmgen_kernels.patching.handle import patch_with

B, T, D = 3, 17, 48
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 3e-2)}


def inputs(dtype=torch.float32, dim=D, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dim, generator=generator).to(dtype).requires_grad_() for shape in ((B, T), (B,))]


def results(model, dtype=torch.float32, call=None, dim=D):
    x, c = inputs(dtype, dim)
    out = (model if call is None else call)(x, c)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    leaves = {"x": x, "c": c, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    of_all = max(float(of.abs().max()) for of in expected.values())
    for name, of in expected.items():
        relative, absolute = TOLERANCES[of.dtype]
        assert got[name].dtype == of.dtype, name
        largest = of_all if name.endswith("k_norm.bias") else float(of.abs().max())  # which is 0 but for roundings
        assert torch.allclose(got[name], of, rtol=relative, atol=absolute * largest), name


def block_calls(model, *arguments):
    """How often the fused operator runs in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(*arguments)
    return sum(event.name == "mmgen_kernels::dit_block" for event in profile.events())


OPTIONS = ({}, {"affine": True}, {"approximate": "none"}, {"mlp_ratio": 2.5}, {"qk_norm": nn.LayerNorm}, {"qk_norm": RMSNorm})
EXACT = (torch.float64, torch.float32)  # in bf16 only verification compares the others, with what stock rounds besides


@pytest.mark.parametrize(("options", "dtype"), [*((o, d) for o in OPTIONS for d in EXACT), ({}, torch.bfloat16)], ids=str)
def test_served(options, dtype):
    model = drawn(DiT(**options)).to(dtype)
    expected = results(model, dtype)
    with mk.patch(model, strict=True) as handle:
        assert len(handle.replaced) == 4
        assert block_calls(model, *inputs(dtype)) == 3
        assert_close(results(model, dtype), expected)
    after = results(model, dtype)
    assert all(torch.equal(after[name], expected[name]) for name in expected)  # reverted to the bit
    assert block_calls(model, *inputs(dtype)) == 0


@pytest.mark.parametrize("shifts", (True, False))
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_lightning(shifts, dtype):
    block = drawn(LightningDiTBlock(D, 2, shifts)).to(dtype)
    expected = results(block, dtype)
    turned = block(*inputs(dtype), lambda x: 2 * x)
    with mk.patch(block, strict=True):
        assert_close(results(block, dtype), expected)
        assert block_calls(block, *inputs(dtype), None) == 1
        assert torch.equal(block(*inputs(dtype), lambda x: 2 * x), turned)  # stock's
        assert torch.equal(block(*inputs(dtype), feat_rope=lambda x: 2 * x), turned)


class Turned(nn.Module):
    """Blocks that share an embedding, as a model has them."""

    def __init__(self, side=4, depth=2, **rope):
        super().__init__()
        self.rope = RotaryEmbedding(D // 2, side, **rope)
        self.blocks = nn.ModuleList([LightningDiTBlock(D, 2) for _ in range(depth)])

    def forward(self, x, c):
        x = x[:, : len(self.rope.freqs_cos)]
        for block in self.blocks:
            x = block(x, c, self.rope)
        return x


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rotary_embedding(dtype):
    model = drawn(Turned(depth=1)).to(dtype)
    expected, rope = results(model, dtype), dict(vars(model.rope))
    q = torch.randn(B, 2, 16, D // 2, dtype=dtype)
    turned = model.rope(q)
    with mk.patch(model, strict=True) as handle:
        assert [r.kind for r in handle.replaced] == ["RotaryEmbedding", "LightningDiTBlock"]
        assert block_calls(model, *inputs(dtype)) == 1
        assert_close(results(model, dtype), expected)
        assert torch.equal(model.rope(q), turned)  # by itself it is stock's
        assert_close(results(model, dtype, call=torch.compile(model, fullgraph=True, backend="aot_eager")), expected)
    after = results(model, dtype)
    assert all(torch.equal(after[name], expected[name]) for name in expected) and vars(model.rope) == rope


def test_fp32_tables_beside_bf16_blocks():
    model = drawn(Turned(depth=1))
    model.blocks.bfloat16()
    expected = results(model, torch.bfloat16)
    with mk.patch(model, strict=True):
        assert block_calls(model, *inputs(torch.bfloat16)) == 1
        assert_close(results(model, torch.bfloat16), expected)


def test_an_embedding_of_other_pairs_is_found_out():
    model = drawn(Turned(neighbours=False))
    expected = results(model)
    handle = mk.patch(model)
    assert "kept     rope (RotaryEmbedding)" in handle.report() and "differs" in handle.report()
    assert len(handle.replaced) == 2 and block_calls(model, *inputs()) == 0
    assert all(torch.equal(of, expected[name]) for name, of in results(model).items())  # stock's


def test_whoever_listens_to_the_embedding_is_heard():
    model = drawn(Turned())
    mk.patch(model, strict=True)
    assert block_calls(model, *inputs()) == 2
    heard = []
    model.rope.register_forward_hook(lambda *_: heard.append(1))
    assert block_calls(model, *inputs()) == 0 and len(heard) == 4


def test_tables_for_other_tokens_are_stocks_to_refuse():
    block, rope = drawn(LightningDiTBlock(D, 2)), RotaryEmbedding(D // 2, 3)
    mk.patch([block, rope], strict=True)
    with pytest.raises(RuntimeError, match="must match the size"):
        block(*inputs(), rope)


def test_under_autocast():
    model = drawn(DiT())
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model)
        with mk.patch(model, strict=True):
            got = results(model)
            assert block_calls(model, *inputs()) == 3
    assert got["out"].dtype == expected["out"].dtype
    for name, of in expected.items():
        assert torch.allclose(got[name], of, rtol=3e-2, atol=3e-2 * float(of.abs().max())), name


@pytest.mark.parametrize(
    ("change", "told"),
    (
        (lambda b: setattr(b.attn, "q_norm", nn.LayerNorm(24)), "q_norm is LayerNorm"),
        (lambda b: setattr(b.attn, "attn_drop", nn.Dropout(0.1)), "attn_drop is Dropout"),
        (lambda b: setattr(b.mlp, "act", nn.SiLU()), "mlp.act is a SiLU"),
        (lambda b: setattr(b, "norm1", nn.GroupNorm(2, D)), "norm1 is a GroupNorm"),
        (lambda b: setattr(b, "norm1", RMSNorm(D)), "norm1 is RMSNorm()"),
        (lambda b: setattr(b, "norm1", nn.LayerNorm(7)), "norm1 is over (7,)"),
        (lambda b: setattr(b, "norm2", nn.LayerNorm(D, eps=1e-5)), "norm2 LayerNorm((48,), eps=1e-05"),
        (lambda b: setattr(b.attn, "num_heads", 5), "num_heads = 5"),
        (lambda b: setattr(b.attn, "qkv", nn.Sequential(nn.Linear(D, 3 * D))), None),
        (lambda b: setattr(b.adaLN_modulation, "1", nn.Linear(D, 5 * D)), "6 or 4 vectors of 48"),
        (lambda b: setattr(b.mlp, "fc1", type("LoRA", (nn.Linear,), {})(D, 4 * D)), "fc1 is a LoRA"),
    ),
)
def test_not_served(change, told):
    block = DiTBlock(D, 2)
    change(block)
    if told is None:  # not even recognised
        with pytest.raises((RuntimeError, AttributeError)):
            mk.patch(block, strict=True)
        return
    handle = mk.patch(block)
    assert not handle.replaced
    assert told in handle.report()


def test_another_forward_of_the_same_parts_is_found_out():
    """The gate before the projection, the norms after: structure cannot tell, numbers do."""

    class Other(DiTBlock):
        def forward(self, x, c):
            return super().forward(x, 1.5 * c)

    handle = mk.patch(Other(D, 2))
    assert not handle.replaced and "differs" in handle.report()


@pytest.mark.parametrize("listen", ("hook", "forward", "lora"))
def test_whoever_listens_to_a_part_is_heard(listen):
    model = drawn(DiT())
    mk.patch(model, strict=True)
    heard, block = [], model.blocks[1]
    if listen == "hook":
        block.attn.proj.register_forward_hook(lambda *_: heard.append(1))
    elif listen == "forward":
        stock = block.mlp.forward
        block.mlp.forward = lambda x: heard.append(1) or stock(x)
    else:
        block.attn.qkv = nn.utils.parametrizations.weight_norm(block.attn.qkv)
    assert block_calls(model, *inputs()) == 2
    assert heard == ([] if listen == "lora" else [1])


@pytest.mark.parametrize(
    "shapes", (((T, D), (D,)), ((B, T, D), (B, T, D))), ids=("x without a batch", "a conditioning of tokens")
)
def test_other_calls_are_stock(shapes):
    """Which raises, or not, as it will."""
    block = drawn(DiTBlock(D, 2))
    x, c = (torch.randn(shape) for shape in shapes)
    with pytest.raises((RuntimeError, IndexError, ValueError)) as stock:
        block(x, c)
    mk.patch(block, strict=True)
    with pytest.raises(stock.type):
        block(x, c)


@pytest.mark.parametrize("batches", ((B, 1), (1, B)), ids=("one conditioning for all", "one x for all"))
def test_a_batch_of_one_is_broadcast_as_in_stock(batches):
    of_x, of_c = batches
    for stock in (DiTBlock(D, 2), DiT(depth=1).final_layer):
        module, x, c = drawn(stock), torch.randn(of_x, T, D), torch.randn(of_c, D)
        expected = module(x, c)
        with mk.patch(module, strict=True):
            torch.testing.assert_close(module(x, c), expected)


def test_checkpointing_and_compile():
    model = drawn(DiT(depth=2))
    expected = results(model)
    with mk.patch(model, strict=True):

        def checkpointed(x, c):
            for block in model.blocks:
                x = checkpoint(block, x, c, use_reentrant=False)
            return model.final_layer(x, c)

        assert_close(results(model, call=checkpointed), expected)
        assert_close(results(model, call=torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


def test_copies_serve_themselves():
    model = drawn(DiT(depth=1))
    mk.patch(model, strict=True)
    ema = copy.deepcopy(model)
    mk.update_ema(ema, drawn(DiT(depth=1), seed=5), decay=0)
    assert_close(results(ema), results(drawn(DiT(depth=1), seed=5)))


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
def test_fsdp(tmp_path):
    from torch.distributed.fsdp import fully_shard

    expected = results(drawn(DiT()))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = drawn(DiT())
        mk.patch(model, strict=True)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert block_calls(model, *inputs()) == 3
        x, c = inputs()
        out = model(x, c)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        got = {"out": out.detach(), "x": x.grad, "c": c.grad}
        got |= {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        assert_close(got, expected)
    finally:
        dist.destroy_process_group()


def test_xl_2_is_verified_in_a_second_and_once():
    with torch.device("meta"):
        model = DiT(dim=1152, depth=28, num_heads=16)
    one = DiTBlock(1152, 16)  # 28 blocks of 16 MB would only take memory: they share one block's
    model.blocks = nn.ModuleList([one, *(copy.copy(one) for _ in range(27))])
    model.final_layer = FinalLayer(1152, 2, 8)
    verified = []
    stock = verification._differences

    def counted(rule, module):
        verified.append(type(rule).__name__)
        return stock(rule, module)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(verification, "_differences", counted)
        patching.setattr(verification, "_verified", set())
        start = time.process_time()
        handle = patch_with(dit.RULES, model, families=None, verify=True, strict=True)
        seconds = time.process_time() - start
    assert len(handle.replaced) == 29 and verified == ["BlockRule", "FinalLayerRule"]
    assert seconds < 20, seconds  # the figure is in docs/blocks.md; a loaded machine is slower
