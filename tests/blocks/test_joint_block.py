"""mk.nn.JointDiTBlock: against the formula as it is written, and against diffusers' block where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk

B, S, T, D, H = 3, 7, 10, 32, 2
ROUNDING = 2e-5  # of a tensor's largest value, or of 1: products in another order; 60 seeds stay below 9e-6
OPTIONS = (
    {},
    {"qk_norm": "rms"},
    {"qk_norm": "layer", "context_pre_only": True},
    {"qk_norm": "rms", "dual_attention": True},
    {"cond_dim": 20, "mlp_ratio": 2},
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def drawn(block):
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block


def inputs(cond_dim=D, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((B, S, D), (B, T, D), (B, cond_dim))]


def plain(block, context, x, c, lengths=None):
    """The formula in separate operations."""

    def norm(t, shift, scale):
        return F.layer_norm(t, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def qkv(attn, h):
        q, k, v = attn["qkv"](h).view(B, h.shape[1], 3, H, D // H).permute(2, 0, 3, 1, 4)
        if block.qk_norm == "rms":
            q, k = (F.rms_norm(t, (D // H,), attn[n].weight, 1e-6) for t, n in ((q, "ln_q"), (k, "ln_k")))
        if block.qk_norm == "layer":
            q, k = (F.layer_norm(t, (D // H,), attn[n].weight, attn[n].bias, 1e-6) for t, n in ((q, "ln_q"), (k, "ln_k")))
        return q, k, v

    def mlp(stream, t, shift, scale, gate):
        hidden = F.gelu(stream.mlp["fc1"](norm(t, shift, scale)), approximate="tanh")
        return t + gate[:, None] * stream.mlp["fc2"](hidden)

    text, image = block.context_block, block.x_block
    of_text = text.adaLN_modulation[1](F.silu(c)).chunk(text.count, 1)
    of_image = image.adaLN_modulation[1](F.silu(c)).chunk(image.count, 1)
    streams = qkv(text.attn, norm(context, *of_text[:2])), qkv(image.attn, norm(x, *of_image[:2]))
    mask = None
    if lengths is not None:
        seen = torch.cat((torch.arange(S) < lengths[:, None], torch.ones(B, T, dtype=torch.bool)), 1)
        mask = seen[:, None, None]
    out = F.scaled_dot_product_attention(*(torch.cat(t, 2) for t in zip(*streams, strict=True)), mask)
    of_context, attended = out.transpose(1, 2).flatten(2).split((S, T), 1)
    alone = norm(x, *of_image[6:8]) if len(of_image) == 9 else None
    x = x + of_image[2][:, None] * image.attn["proj"](attended)
    if alone is not None:
        attended = F.scaled_dot_product_attention(*qkv(image.attn2, alone)).transpose(1, 2).flatten(2)
        x = x + of_image[8][:, None] * image.attn2["proj"](attended)
    x = mlp(image, x, *of_image[3:6])
    if block.context_pre_only:
        return None, x
    context = context + of_text[2][:, None] * text.attn["proj"](of_context)
    return mlp(text, context, *of_text[3:6]), x


def results(function, given, parameters):
    outputs = [o for o in function(*given) if o is not None]
    return *outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), (*given, *parameters), allow_unused=True)


def assert_close(got, expected, **law):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        if not law:
            law = {"rtol": 0, "atol": ROUNDING}
        torch.testing.assert_close(a, b, rtol=law["rtol"], atol=law["atol"] * max(1, float(b.detach().abs().max())))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula(options):
    block = drawn(mk.nn.JointDiTBlock(D, H, **options)).double()
    given = inputs(options.get("cond_dim", D), torch.float64)
    expected = results(lambda *t: plain(block, *t), given, block.parameters())
    assert_close(results(block, given, block.parameters()), expected, rtol=1e-9, atol=1e-9)
    narrow = drawn(mk.nn.JointDiTBlock(D, H, **options))
    given = inputs(options.get("cond_dim", D))
    assert_close(results(narrow, given, narrow.parameters()), results(lambda *t: plain(narrow, *t), given, narrow.parameters()))


def test_lengths_of_the_context():
    block, given, lengths = drawn(mk.nn.JointDiTBlock(D, H, qk_norm="rms")), inputs(), torch.tensor([7, 0, 3])
    expected = plain(block, *given, lengths)
    assert_close(block(*given, context_lengths=lengths), expected)


def test_state_dict_is_that_of_stable_diffusion_3():
    both = {f"{s}.{n}" for s in ("context_block", "x_block") for n in ("attn.qkv", "adaLN_modulation.1")}
    back = {f"{s}.{n}" for s in ("context_block", "x_block") for n in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    keys = {f"{n}.{kind}" for n in both | back for kind in ("weight", "bias")}
    assert set(mk.nn.JointDiTBlock(D, H).state_dict()) == keys
    norms = {f"{s}.attn.{n}.weight" for s in ("context_block", "x_block") for n in ("ln_q", "ln_k")}
    assert set(mk.nn.JointDiTBlock(D, H, qk_norm="rms").state_dict()) == keys | norms
    last = mk.nn.JointDiTBlock(D, H, context_pre_only=True).state_dict()
    assert set(last) == {k for k in keys if not k.startswith("context_block") or "qkv" in k or "adaLN" in k}
    assert last["context_block.adaLN_modulation.1.weight"].shape == (2 * D, D)
    dual = mk.nn.JointDiTBlock(D, H, dual_attention=True).state_dict()
    assert {"x_block.attn2.qkv.weight", "x_block.attn2.proj.bias"} <= set(dual)
    assert dual["x_block.adaLN_modulation.1.weight"].shape == (9 * D, D)


def test_a_new_block_is_the_identity_and_learns():
    block, (context, x, c) = mk.nn.JointDiTBlock(D, H), inputs()
    got = block(context, x, c)
    assert torch.equal(got[0], context) and torch.equal(got[1], x)
    sum(o.square().sum() for o in got).backward()
    assert block.x_block.adaLN_modulation[1].weight.grad.any() and block.context_block.adaLN_modulation[1].weight.grad.any()


@pytest.mark.parametrize(("options", "message"), (
    ({"num_heads": 5}, "num_heads must divide hidden_size = 32 into heads of a multiple of 8 channels, up to 256, got 5"),
    ({"num_heads": 0}, "num_heads must divide hidden_size"),
    ({"hidden_size": 4096, "num_heads": 8}, "num_heads must divide hidden_size = 4096 into heads .*up to 256, got 8"),
    ({"qk_norm": "batch"}, "qk_norm must be one of layer, rms, got 'batch'"),
))  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        mk.nn.JointDiTBlock(**({"hidden_size": D, "num_heads": H} | options))


def test_checkpoint_autocast_and_compile():
    block, given = drawn(mk.nn.JointDiTBlock(D, H, qk_norm="rms", dual_attention=True)), inputs()
    expected = results(block, given, block.parameters())
    assert_close(results(lambda *t: checkpoint(block, *t, use_reentrant=False), given, block.parameters()), expected)
    assert_close(results(torch.compile(block, fullgraph=True, backend="aot_eager"), given, block.parameters()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        context, x = block(*given)
        stock = plain(block, *given)
    assert context.dtype == x.dtype == torch.float32  # the residual keeps its dtype
    assert_close((context, x), [t.float() for t in stock], rtol=0.1, atol=0.3)


@pytest.mark.parametrize("options", ({}, {"qk_norm": "rms_norm", "use_dual_attention": True}, {"context_pre_only": True}), ids=str)
def test_it_is_the_block_of_diffusers(options):
    attention = pytest.importorskip("diffusers.models.attention")
    stock = drawn(attention.JointTransformerBlock(D, H, D // H, **options))
    rms, dual = ("rms" if "qk_norm" in options else None), options.get("use_dual_attention", False)
    last = options.get("context_pre_only", False)
    block = mk.nn.JointDiTBlock(D, H, qk_norm=rms, dual_attention=dual, context_pre_only=last)
    weights, loaded = stock.state_dict(), {}

    def packed(stream, attn, names):
        for kind in ("weight", "bias"):
            loaded[f"{stream}.qkv.{kind}"] = torch.cat([weights[f"{attn}.{n}.{kind}"] for n in names])

    def copied(ours, theirs):
        loaded.update({f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")})

    of_image, of_text = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    packed("x_block.attn", "attn", of_image)
    packed("context_block.attn", "attn", of_text)
    copied("x_block.adaLN_modulation.1", "norm1.linear")
    copied("context_block.adaLN_modulation.1", "norm1_context.linear")
    if last:  # diffusers has the scale before the shift there
        for kind in ("weight", "bias"):
            scale, shift = weights[f"norm1_context.linear.{kind}"].chunk(2)
            loaded[f"context_block.adaLN_modulation.1.{kind}"] = torch.cat((shift, scale))
    streams = (("x_block", "attn.to_out.0", "ff"),) + (() if last else (("context_block", "attn.to_add_out", "ff_context"),))
    for stream, proj, ff in streams:
        copied(f"{stream}.attn.proj", proj)
        copied(f"{stream}.mlp.fc1", f"{ff}.net.0.proj")
        copied(f"{stream}.mlp.fc2", f"{ff}.net.2")
    if dual:
        packed("x_block.attn2", "attn2", of_image)
        copied("x_block.attn2.proj", "attn2.to_out.0")
    if rms:
        norms = (("x_block.attn", "attn.norm_"), ("context_block.attn", "attn.norm_added_"), ("x_block.attn2", "attn2.norm_"))
        for ours, theirs in norms:
            loaded |= {f"{ours}.ln_{n}.weight": weights[f"{theirs}{n}.weight"] for n in "qk"}
    block.load_state_dict(loaded)
    context, x, c = inputs()
    with torch.no_grad():
        expected = stock(hidden_states=x, encoder_hidden_states=context, temb=c)
        assert_close(block(context, x, c), expected)
