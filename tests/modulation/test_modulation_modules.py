"""mk.nn's norms: formulas against fp64, addressing, initial values, dtypes, saving, compiling."""

import copy
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels import nn

B, T, D, C = 3, 6, 20, 12
NORMS = ("layer", "rms")
MAKERS = {
    "RMSNorm": lambda: nn.RMSNorm(D),
    "AdaLayerNorm": lambda: nn.AdaLayerNorm(D, C, elementwise_affine=True),
    "AdaLayerNorm rms": lambda: nn.AdaLayerNorm(D, C, norm="rms", elementwise_affine=True),
    "AdaLayerNormZero": lambda: nn.AdaLayerNormZero(D, C),
}


def randomized(module, seed=0):
    """Zeros and ones would hide what is mixed up."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(module):
    return (draw(B, T, D),) if isinstance(module, nn.RMSNorm) else (draw(B, T, D), draw(B, C, seed=2))


def normed(x, norm, eps):
    """The formula, in fp64."""
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def vectors(module, cond, count):
    linear = module.linear
    found = F.silu(cond.double()) @ linear.weight.double().T
    return (found if linear.bias is None else found + linear.bias.double()).chunk(count, -1)


def assert_near(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", (1e-6, 0.5))
@pytest.mark.parametrize("affine", (False, True))
def test_rms_norm(affine, eps):
    module = randomized(nn.RMSNorm(D, eps, affine))
    weight = module.weight.double() if affine else 1.0
    for x in (draw(B, T, D), draw(B, 2, 3, D), draw(5, D)):
        assert_near(module(x), normed(x, "rms", eps) * weight)
    assert [name for name, _ in module.named_parameters()] == ["weight"] * affine


@pytest.mark.parametrize("options", ({}, {"elementwise_affine": True, "eps": 0.5}, {"bias": False}), ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_ada_layer_norm(norm, options):
    module = randomized(nn.AdaLayerNorm(D, C, norm=norm, **options))
    x, cond = draw(B, T, D), draw(B, C, seed=2)
    shift, scale = vectors(module, cond, 2)
    n = normed(x, norm, options.get("eps", 1e-6))
    n = n if module.weight is None else n * module.weight.double()
    n = n if module.bias is None else n + module.bias.double()
    assert_near(module(x, cond), n * (1 + scale[:, None]) + shift[:, None])
    assert (module.linear.bias is None) == (options.get("bias") is False)
    assert (module.bias is None) == (norm == "rms" or not options.get("elementwise_affine", False))


@pytest.mark.parametrize("norm", NORMS)
def test_zero_returns_what_a_block_needs(norm):
    module = randomized(nn.AdaLayerNormZero(D, C, norm=norm, eps=0.1))
    x, cond = draw(B, T, D), draw(B, C, seed=2)
    out = module(x, cond)
    shift_msa, scale_msa, *others = vectors(module, cond, 6)
    assert_near(out.modulated, normed(x, norm, 0.1) * (1 + scale_msa[:, None]) + shift_msa[:, None])
    assert out._fields == ("modulated", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
    for found, expected in zip(out[1:], others, strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_the_seam_is_gated_residual_and_norm(norm):
    module = randomized(nn.AdaLayerNormZero(D, C, norm=norm, eps=0.1))
    x, y, cond = draw(B, T, D), draw(B, T, D, seed=3), draw(B, C, seed=2)
    _, gate, shift, scale, _ = module(x, cond)
    residual, modulated = module.seam(x, y, gate, shift, scale)
    expected = x.double() + gate.double()[:, None] * y.double()
    assert_near(residual, expected)
    assert_near(modulated, normed(expected, norm, 0.1) * (1 + scale.double()[:, None]) + shift.double()[:, None])


def test_a_block_begins_as_the_identity():
    adaln, attention, mlp = nn.AdaLayerNormZero(D), torch.nn.Linear(D, D), torch.nn.Linear(D, D)
    assert adaln.linear.weight.shape == (6 * D, D) and not any(p.any() for p in adaln.parameters())
    x, cond = draw(B, T, D), draw(B, D, seed=2)
    h, gate_msa, shift_mlp, scale_mlp, gate_mlp = adaln(x, cond)
    assert_near(h, normed(x, "layer", 1e-6))
    residual, h = adaln.seam(x, attention(h), gate_msa, shift_mlp, scale_mlp)
    out = mk.gate_residual(residual, mlp(h), gate_mlp)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert adaln.linear.weight.grad.any()  # the gates' part: so it leaves zero
    assert not attention.weight.grad.any() and not mlp.weight.grad.any()


@pytest.mark.parametrize("make", (MAKERS["AdaLayerNorm"], MAKERS["AdaLayerNormZero"]), ids=("AdaLayerNorm", "AdaLayerNormZero"))
def test_conditioning_of_frames_tokens_and_rows(make):
    """Each is the module called with that token's conditioning."""
    module = randomized(make())
    x = draw(B, T, D)
    rows = torch.tensor([[1, 0, 3, 3, 0, 2], [2] * 6, [0, 1, 2, 3, 0, 1]])
    frames, tokens, table = draw(B, 3, C, seed=3), draw(B, T, C, seed=4), draw(4, C, seed=5)

    def first(out):
        return out if torch.is_tensor(out) else out.modulated

    for found, of_token in (
        (module(x, frames), frames.repeat_interleave(T // 3, 1)),
        (module(x, tokens), tokens),
        (module(x, table, rows), table[rows]),
        (module(x, table, rows=rows.int()), table[rows]),
    ):
        expected = module(x.reshape(B * T, 1, D), of_token.reshape(B * T, C))
        torch.testing.assert_close(first(found), first(expected).view(B, T, D), rtol=1e-5, atol=1e-5)


def test_the_seam_by_rows():
    module = randomized(nn.AdaLayerNormZero(D, C))
    x, y, table = draw(B, T, D), draw(B, T, D, seed=3), draw(4, C, seed=5)
    rows = torch.arange(B * T).view(B, T) % 4
    _, gate, shift, scale, _ = module(x, table, rows)
    for found, expected in zip(
        module.seam(x, y, gate, shift, scale, rows),
        module.seam(x, y, gate[rows], shift[rows], scale[rows]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients(name):
    module = randomized(MAKERS[name]()).double()
    inputs = [a.double().requires_grad_() for a in arguments(module)]
    names = [name for name, _ in module.named_parameters()]

    def call(*tensors):
        parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(module, parameters, tensors[: len(inputs)])

    assert torch.autograd.gradcheck(call, (*inputs, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_dtypes(name, dtype):
    module = randomized(MAKERS[name]()).to(dtype)
    out = torch.utils._pytree.tree_leaves(module(*(a.to(dtype) for a in arguments(module))))
    assert {o.dtype for o in out} == {dtype}


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_gives_its_dtype(name):
    module = randomized(MAKERS[name]())
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.utils._pytree.tree_leaves(module(*arguments(module)))
    assert {o.dtype for o in out} == {torch.bfloat16}
    expected = torch.utils._pytree.tree_leaves(module(*arguments(module)))
    for a, b in zip(out, expected, strict=True):
        assert (a.double() - b.double()).norm() < 0.02 * b.double().norm()


def test_autocast_leaves_the_residual_alone():
    module = randomized(nn.AdaLayerNormZero(D, C))
    with torch.autocast("cpu", torch.bfloat16):
        _, gate, shift, scale, _ = module(*arguments(module))
        residual, modulated = module.seam(draw(B, T, D), draw(B, T, D, seed=3).bfloat16(), gate, shift, scale)
    assert residual.dtype == torch.float32 and modulated.dtype == torch.bfloat16


@pytest.mark.parametrize("name", MAKERS)
def test_saving_and_copying(name):
    module = randomized(MAKERS[name]())
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    loaded = MAKERS[name]()
    loaded.load_state_dict(module.state_dict())
    expected = torch.utils._pytree.tree_leaves(module(*arguments(module)))
    for other in (loaded, copy.deepcopy(module), torch.load(stored, weights_only=False)):
        for a, b in zip(torch.utils._pytree.tree_leaves(other(*arguments(module))), expected, strict=True):
            assert torch.equal(a, b)


def test_names_of_parameters():
    """A checkpoint's keys do not change without notice."""
    assert list(nn.AdaLayerNorm(D, elementwise_affine=True).state_dict()) == ["weight", "bias", "linear.weight", "linear.bias"]
    assert list(nn.AdaLayerNormZero(D, bias=False).state_dict()) == ["linear.weight"]
    assert list(nn.RMSNorm(D).state_dict()) == ["weight"]


def test_checkpointing_gives_the_same_gradients():
    module = randomized(nn.AdaLayerNormZero(D, C))
    found = []
    for run in (module, lambda *a: checkpoint(module, *a, use_reentrant=False)):
        x, cond = (a.requires_grad_() for a in arguments(module))
        run(x, cond).modulated.square().sum().backward()
        found.append((x.grad, cond.grad, module.linear.weight.grad))
        module.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.unpoisoned
def test_compiled_as_one_graph():
    for make in MAKERS.values():
        module = randomized(make())
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        pairs = (torch.utils._pytree.tree_leaves(side(*arguments(module))) for side in (compiled, module))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)


def test_bad_input():
    for kind in (nn.AdaLayerNorm, nn.AdaLayerNormZero):
        with pytest.raises(ValueError, match="norm must be one of layer, rms, got 'batch'"):
            kind(D, norm="batch")
        with pytest.raises(ValueError, match=r"x must have dim = 20 as its last size, got shape \(3, 6, 8\)"):
            kind(D)(draw(B, T, 8), draw(B, D))
        with pytest.raises(ValueError, match=r"shift must be .* got shape \(2, 20\)"):
            kind(D)(draw(B, T, D), draw(2, D))
    with pytest.raises(ValueError, match=r"x must have dim = 20 as its last size, got shape \(3, 6, 8\)"):
        nn.RMSNorm(D, elementwise_affine=False)(draw(B, T, 8))
    with pytest.raises(ValueError, match="eps must be at least 0"):
        nn.RMSNorm(D, eps=-1)(draw(B, T, D))


def test_what_is_printed():
    assert repr(nn.RMSNorm(D)) == "RMSNorm(20, eps=1e-06, elementwise_affine=True)"
    assert "20, norm='rms', eps=1e-06, elementwise_affine=False" in repr(nn.AdaLayerNorm(D, norm="rms"))
    assert "20, norm='layer', eps=1e-06" in repr(nn.AdaLayerNormZero(D))


@pytest.mark.parametrize("kind", (nn.RMSNorm, nn.AdaLayerNorm, nn.AdaLayerNormZero))
def test_documented(kind):
    text = inspect.getdoc(kind)
    assert all(part in text for part in ("Args:", "Shape:", "Source:"))
