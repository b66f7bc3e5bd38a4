"""mk.patch on diffusers' transformer blocks: by twins of their structure, and by themselves where they are installed."""

import copy

import pytest
import torch
import torch.distributed as dist
from block_cases import (
    CASES,
    B,
    D,
    S,
    T,
    accumulated,
    arguments,
    assert_same,
    beyond_the_law,
    make,
    operator_calls,
    patched,
    results,
    served,
    vanishes,
    widened,
)
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mmgen_kernels as mk
from mmgen_kernels.patching import diffusers_blocks, diffusers_joint_blocks, diffusers_lumina_blocks, verification
from mmgen_kernels.patching.diffusers_blocks import TOKENS

DRAWS = 24  # judged at once: in bf16 the error of a single draw's gradients is a matter of luck


@pytest.fixture(params=("twin", "diffusers"))
def library(request):
    return request.param


@pytest.fixture
def unverified(monkeypatch):
    monkeypatch.setattr(verification, "_verified", set())


# -- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("case", CASES)
def test_served(library, case, dtype):
    block, given = make(library, case, dtype), arguments(case, dtype)
    expected = results(block, given)
    inside = "sd3.5" in case or "lumina" in case or (library == "diffusers" and "flux" in case)  # fp32, for fp64 tokens too
    with mk.patch(block, families="blocks", strict=True) as handle:
        assert [r.verified for r in handle.replaced] == [True]
        assert served(block, given, case)
        assert_same(results(block, given), expected, tolerance=1e-5 if inside and dtype == torch.float64 else None)
    after = results(block, given)
    assert all(torch.equal(after[name], of) for name, of in expected.items())  # reverted to the bit
    assert operator_calls(block, given) == {}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_fp64_than_stock(case, dtype):
    block = make("twin", case, dtype)
    ours, exact, draws = patched(block), copy.deepcopy(block).double(), [arguments(case, dtype, seed) for seed in range(DRAWS)]
    sides = []
    for side, inputs in ((ours, draws), (block, draws), (exact, map(widened, draws))):
        runs = [results(side, given) for given in inputs]
        sides.append({name: torch.stack([run[name] for run in runs]) for name in runs[0] if not vanishes(name)})
    assert not beyond_the_law(*sides)


@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", CASES)
def test_under_autocast(library, case, x_dtype):
    block, given = make(library, case), arguments(case, x_dtype)
    ours = patched(block)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = results(ours, given), results(block, given)
        widening = "scale_shift_table" in expected or "norm2.weight" in expected  # fp32: the residual is no longer bf16
        assert served(ours, given, case) == (x_dtype == torch.float32 or not widening)
    assert_same(found, expected, tolerance=6e-2)


@pytest.mark.parametrize("case", CASES)
def test_with_the_norms_inside_patched_too(library, case):
    block, given = make(library, case), arguments(case)
    expected = results(block, given)
    with mk.patch(block, strict=True) as handle:
        assert handle.replaced[0].name == type(block).__name__
        assert served(block, given, case)
        assert_same(results(block, given), expected)


# -- in a block's life ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("case", CASES)
def test_gradient_checkpointing(case, reentrant):
    ours, given = patched(make("twin", case)), arguments(case)
    expected = results(ours, given)

    def checkpointed(**given):
        return checkpoint(lambda *values: ours(**dict(zip(given, values, strict=True))), *given.values(), use_reentrant=reentrant)

    assert_same(accumulated(ours, given, call=checkpointed), expected, tolerance=1e-12)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("dit, erf", "latte", "sd3", "flux, no rope", "lumina2")])
def test_compiled_as_one_graph(library, case):
    ours, given = patched(make(library, case)), arguments(case)
    assert_same(results(ours, given, call=torch.compile(ours, fullgraph=True, backend="aot_eager")), results(ours, given))


def test_copies_serve_themselves():
    ours = patched(make("twin", "dit"))
    twin = copy.deepcopy(ours)
    nn.init.zeros_(twin.norm1.linear.weight)
    nn.init.zeros_(twin.norm1.linear.bias)
    given = arguments("dit")
    assert torch.equal(twin(**given), given["hidden_states"]) and not torch.equal(ours(**given), given["hidden_states"])


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
def test_fsdp(library, tmp_path):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for case in CASES:
            given = arguments(case)
            expected = results(make(library, case), given)
            ours = patched(make(library, case))
            fully_shard(ours, mesh=mesh)
            assert served(ours, given, case)
            assert_same(accumulated(ours, given), expected)
    finally:
        dist.destroy_process_group()


# -- what is stock's --------------------------------------------------------------------------------------------------


def attention_of(block):
    return block.attn1 if hasattr(block, "attn1") else block.attn


def exchanged(block):
    processor = attention_of(block).processor
    attention_of(block).processor = type("Mine", (type(processor),), {})()


def wrapped(block):
    stock = attention_of(block).forward
    attention_of(block).forward = lambda *args, **kwargs: stock(*args, **kwargs)


def dropping(block):
    for part in block.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5


CHANGES = {
    "hook": lambda block: attention_of(block).register_forward_hook(lambda *_: None),
    "hook of a projection": lambda block: attention_of(block).to_q.register_forward_hook(lambda *_: None),
    "forward": wrapped,
    "no plain linear": lambda block: parametrizations.weight_norm(attention_of(block).to_v),
    "processor": exchanged,
    "backend": lambda block: setattr(attention_of(block).processor, "_attention_backend", "flash"),
    "fused projections": lambda block: setattr(attention_of(block), "fused_projections", True),
    "chunks": lambda block: setattr(block, "_chunk_size", 3),
    "dropout": dropping,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_what_has_changed_since_is_stocks(case, change):
    block = make("twin", case)
    if change == "dropout" and not any(isinstance(part, nn.Dropout) for part in block.modules()):
        pytest.skip("this one has none")
    ours, given = patched(block), arguments(case)
    for side in (block, ours):
        CHANGES[change](side)
    assert operator_calls(ours, given) == {}
    found, expected = results(ours, given), results(block, given)
    assert all(torch.equal(found[name], of) for name, of in expected.items())
    if change == "dropout":  # drops nothing then
        assert served(ours.eval(), given, case)


OTHER_CALLS = {
    "attention kwargs": ("dit", lambda given: {"cross_attention_kwargs": {"image_rotary_emb": None}}),
    "a mask for each head": ("dit", lambda given: {"attention_mask": torch.randn(B, 1, T).bool()}),
    "a mask of texts": ("pixart", lambda given: {"encoder_attention_mask": torch.ones(B, S, dtype=torch.bool)}),
    "vectors of another dtype": ("latte", lambda given: {"timestep": given["timestep"].double()}),
    "joint attention kwargs": ("sd3", lambda given: {"joint_attention_kwargs": {"attention_mask": None}}),
    "one conditioning for all": ("sd3", lambda given: {"temb": given["temb"][:1]}),
    "text of another dtype": ("sd3", lambda given: {"encoder_hidden_states": given["encoder_hidden_states"].double()}),
    "tables that are learned": ("flux", lambda given: {"image_rotary_emb": learned(given)}),
    "tables for the text alone": ("flux", lambda given: {"image_rotary_emb": tuple(t[:S] for t in given["image_rotary_emb"])}),
    "tables for the text alone, single": (
        "flux single", lambda given: {"image_rotary_emb": tuple(t[:S] for t in given["image_rotary_emb"])},
    ),
    "a mask for each query": ("lumina2", lambda given: {"attention_mask": torch.ones(B, T * T, dtype=torch.bool)}),
    "angles for all samples": ("lumina2", lambda given: {"image_rotary_emb": given["image_rotary_emb"][:1]}),
    "no conditioning": ("lumina2", lambda given: {"temb": None}),
}  # fmt: skip


def learned(given):
    return tuple(table.clone().requires_grad_() for table in given["image_rotary_emb"])


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_other_calls_are_stocks(call):
    case, other = OTHER_CALLS[call]
    block, given = make("twin", case).eval(), arguments(case)
    ours, given = patched(block), given | other(given)
    outcomes = []
    for side in (block, ours):
        try:
            outcomes.append(tree_leaves(side(**given)))
        except (RuntimeError, TypeError, IndexError) as error:
            outcomes.append([str(error)])
    assert len(outcomes[0]) == len(outcomes[1])
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    if isinstance(outcomes[0][0], torch.Tensor):
        assert operator_calls(ours, given) == {}


@pytest.mark.parametrize("case", ("dit", "pixart", "sd3", "flux"))
def test_few_tokens_are_stocks(case, monkeypatch, unverified):
    """Those of verification are not: it found the block to be right."""
    wanted = B * T * D
    monkeypatch.setattr(diffusers_blocks.BlockForward, "fewest", wanted + 1)
    ours, given = patched(make("twin", case)), arguments(case)
    assert operator_calls(ours, given) == {}
    assert served(patched(make("twin", case, torch.bfloat16)), arguments(case, torch.bfloat16), case)
    monkeypatch.setattr(diffusers_blocks.BlockForward, "fewest", wanted)
    assert served(ours, given, case)


def test_a_wrong_block_of_few_tokens_is_found_out(monkeypatch, unverified):
    monkeypatch.setattr(diffusers_blocks.BlockForward, "fewest", 1 << 17)
    monkeypatch.setattr(diffusers_blocks, "attended", lambda attn, x, *_: x)
    handle = mk.patch(make("twin", "dit"), families="blocks")
    assert not handle.replaced and "differs" in handle.report()


REASONS = {
    "attn1 is run by Mine": ("dit", exchanged),
    "attn1 has residual_connection=True": ("dit", lambda b: setattr(b.attn1, "residual_connection", True)),
    "attn1: Mine instead of nn.Linear": ("dit", lambda b: setattr(b.attn1, "to_k", type("Mine", (nn.Linear,), {})(D, D))),
    "attn1 has 5 heads in 48 channels": ("dit", lambda b: setattr(b.attn1, "heads", 5)),
    "attn1 has norm_q LayerNorm": ("dit", lambda b: setattr(b.attn1, "norm_q", nn.LayerNorm(16))),
    "ff.net.0 is a Linear": ("dit", lambda b: b.ff.net.__setitem__(0, nn.Linear(D, 4 * D))),
    "ff is not a projection, a dropout and a projection": ("dit", lambda b: b.ff.net.__setitem__(1, nn.ReLU())),
    "norm3 is a GroupNorm": ("dit", lambda b: setattr(b, "norm3", nn.GroupNorm(2, D))),
    "norm1.linear does not make 6 vectors of 48": ("dit", lambda b: setattr(b.norm1, "linear", nn.Linear(D, 4 * D))),
    "attn2 stands beside": ("dit", lambda b: setattr(b, "attn2", copy.deepcopy(b.attn1))),
    "scale_shift_table has shape (2, 48)": ("latte", lambda b: setattr(b, "scale_shift_table", nn.Parameter(torch.ones(2, D)))),
    "attn has no add_k_proj": ("sd3", lambda b: setattr(b.attn, "add_k_proj", None)),
    "attn has no to_add_out": ("sd3", lambda b: setattr(b.attn, "to_add_out", None)),
    "norm1.linear does not make 9 vectors": ("sd3.5, dual", lambda b: setattr(b.norm1, "linear", nn.Linear(D, 6 * D))),
    "norm1_context.linear does not make 2 vectors": ("sd3.5, last", lambda b: setattr(b.norm1_context, "linear", nn.Linear(D, D))),
    "norm_added_k LayerNorm": ("flux", lambda b: setattr(b.attn, "norm_added_k", nn.LayerNorm(16))),
    "norm_k is over (48,)": ("flux", lambda b: [setattr(b.attn, n, nn.RMSNorm(48, 1e-6)) for n in ("norm_q", "norm_k")]),
    "ff_context is not a projection": ("flux", lambda b: setattr(b, "ff_context", nn.Linear(D, D))),
    "norm2_context is missing": ("flux", lambda b: setattr(b, "norm2_context", None)),
    "attn is run by Mine": ("flux single", exchanged),
    "attn has a projection of its own": ("flux single", lambda b: setattr(b.attn, "to_out", nn.ModuleList([nn.Identity()] * 2))),
    "proj_out is a Sequential": ("flux single", lambda b: setattr(b, "proj_out", nn.Sequential(b.proj_out))),
    "norm1.linear does not make 4 vectors": ("lumina2", lambda b: setattr(b.norm1, "linear", nn.Linear(D, 6 * D))),
    "ffn_norm1 is LayerNorm": ("lumina2", lambda b: setattr(b, "ffn_norm1", nn.LayerNorm(D))),
    "it has pos_embed": ("latte", lambda b: setattr(b, "pos_embed", nn.Identity())),
}


@pytest.mark.parametrize("told", REASONS)
def test_not_served(told):
    case, change = REASONS[told]
    block = make("twin", case)
    change(block)
    handle = mk.patch(block, families="blocks")
    assert not handle.replaced and told in handle.report(), handle.report()


@pytest.mark.parametrize("part", ("norm_q", "to_out", "processor", "heads", "norm1", "norm2", "norm3", "ff", "scale_shift_table"))
@pytest.mark.parametrize("case", CASES)
def test_a_block_without_a_part_is_kept(case, part):
    """Or not known, or served, if the part is not its own: anything but an error in the midst of a model."""
    block = make("twin", case)
    for owner in (block, attention_of(block)):
        if hasattr(owner, part):
            delattr(owner, part)
    handle = mk.patch(block, families="blocks")
    if handle.replaced:
        assert served(block, arguments(case), case)


def test_other_norm_types_are_not_known():
    block = make("twin", "dit")
    block.norm_type = "layer_norm"
    handle = mk.patch(block, families="blocks")
    assert not handle.replaced and not handle.kept


# -- verification -----------------------------------------------------------------------------------------------------


OPERATORS = ("adaln", "attention", "joint_attention", "qk_norm_rope", "gate_residual", "gate_residual_adaln", "adaln_mlp")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_operator_is_found_out(case, operator, monkeypatch, unverified):
    right = getattr(mk, operator)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)  # norms take back what is done to all channels alike
        return tuple(o + 0.002 * o.flip(-1) for o in out) if isinstance(out, tuple) else out + 0.002 * out.flip(-1)

    monkeypatch.setattr(mk, operator, wrong)
    used = operator in CASES[case][3] or operator == "adaln"
    handle = mk.patch(make("twin", case), families="blocks")
    assert used != bool(handle.replaced) and used == ("differs" in handle.report())


VECTORS = [*(("dit", i) for i in range(5)), *(("sd3.5, dual", i) for i in range(8)), *(("lumina2", i) for i in range(3))]


@pytest.mark.parametrize(("case", "first"), VECTORS)
def test_exchanged_vectors_are_found_out(case, first, monkeypatch, unverified):
    right = diffusers_blocks.vectors_of

    def wrong(norm, conditioning, count):
        vectors = list(right(norm, conditioning, count))
        if first + 1 < count:
            vectors[first], vectors[first + 1] = vectors[first + 1], vectors[first]
        return tuple(vectors)

    for module in (diffusers_blocks, diffusers_joint_blocks, diffusers_lumina_blocks):
        monkeypatch.setattr(module, "vectors_of", wrong)
    handle = mk.patch(make("twin", case), families="blocks")
    assert not handle.replaced and "differs" in handle.report()


def test_tables_of_the_other_stream_are_found_out(monkeypatch, unverified):
    right = diffusers_joint_blocks.rotary

    def wrong(rope, tokens):  # the image's tokens first, instead of the text's
        of_image = tokens.stop is None
        return right(rope, slice(0, TOKENS) if of_image else slice(TOKENS, None))

    monkeypatch.setattr(diffusers_joint_blocks, "rotary", wrong)
    handle = mk.patch(make("twin", "flux"), families="blocks")
    assert not handle.replaced and "differs" in handle.report()


def test_another_forward_of_the_same_parts_is_found_out(unverified):
    block = make("twin", "latte")

    class Other(type(block)):
        def forward(
            self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None,
            cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
        ):  # fmt: skip
            return super().forward(hidden_states, attention_mask, timestep=1.5 * timestep)

    block.__class__ = Other
    handle = mk.patch(block, families="blocks")
    assert not handle.replaced and "differs" in handle.report()
