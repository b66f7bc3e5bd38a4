"""mk.patch itself: what it finds, what it leaves, how it is taken back. The layers are twins of taming's and LlamaGen's."""

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from twins import VectorQuantizer, VectorQuantizer2

import mmgen_kernels as mk
from mmgen_kernels.patching import RULES, Forward


def make(**options):
    return VectorQuantizer2(9, 4, 0.25, **options)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(4, 4, 1)
        self.quantize = make()
        self.levels = nn.ModuleList([make(legacy=False), VectorQuantizer(9, 4, 0.25, 0.0, True, True)])

    def forward(self, x):
        x = self.quantize(self.encoder(x))[0]
        for level in self.levels:
            x = level(x)[0]
        return x


def state(module):
    """Everything that the module and its children are, to the bit."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(child).items()}
        for name, child in module.named_modules()
    }


def x():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def test_patch_and_revert():
    model = Model()
    before, keys, stock = state(model), list(model.state_dict()), model(x())
    handle = mk.patch(model, strict=True)
    assert [r.name for r in handle.replaced] == ["quantize", "levels.0", "levels.1"] and not handle.kept
    assert all(isinstance(vars(m)["forward"], Forward) for m in (model.quantize, *model.levels))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x()), stock)
    handle.revert()
    handle.revert()
    after = state(model)
    after["levels.1"]["_buffers"] = before["levels.1"]["_buffers"]  # the same tensor; it compares by elements
    assert after.keys() == before.keys()
    for name in before:
        assert list(after[name]) == list(before[name])
        assert all(after[name][key] is value or after[name][key] == value for key, value in before[name].items())
    assert "reverted since" in handle.report()


def test_context_manager_reverts_even_on_errors():
    module = make()
    with pytest.raises(KeyError), mk.patch(module):
        assert "forward" in vars(module)
        raise KeyError
    assert "forward" not in vars(module)


def test_classes_and_other_instances_stay():
    forward = VectorQuantizer2.forward
    patched, other = make(), make()
    with mk.patch(patched):
        assert VectorQuantizer2.forward is forward and "forward" not in vars(other)


def test_a_module_in_two_places_is_patched_once():
    shared = make()
    handle = mk.patch([shared, nn.ModuleDict({"again": shared})])
    assert len(handle.replaced) == 1
    handle.revert()
    assert "forward" not in vars(shared)


def test_patching_twice():
    module = make()
    first = mk.patch(module)
    forward = module.forward
    second = mk.patch(module, strict=True)
    assert module.forward is forward and not second.replaced
    assert second.kept[0].already_patched and "already patched" in second.report()
    second.revert()
    assert module.forward is forward
    first.revert()
    assert "forward" not in vars(module)


class Pipeline:
    def __init__(self):
        self.vae, self.name, self.others = make(), "pipeline", {"a": [make()]}


class Loop(list):
    pass


def test_what_may_be_patched():
    loop = Loop([make()])
    loop.append(loop)
    for object, names in (
        (make(), ["VectorQuantizer2"]),
        ([make(), {"key": (make(),)}], ["0", "1.key.0"]),
        (Pipeline(), ["vae", "others.a.0"]),
        (loop, ["0"]),
        (nn.Sequential(nn.Linear(1, 1), make()), ["1"]),
    ):
        assert [r.name for r in mk.patch(object).replaced] == names


def test_bad_input():
    for object in (3, None, [], "text", {"a": 1}):
        with pytest.raises(TypeError, match=f"or a scheduler, or hold some, got {type(object).__name__}"):
            mk.patch(object)
    for families in ("attention", ("vq", "attention")):
        with pytest.raises(ValueError, match="families must be among blocks, modulation, schedule, vq, got 'attention'"):
            mk.patch(make(), families=families)
    for name in ("verify", "strict"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
            mk.patch(make(), **{name: 1})


def test_families():
    assert mk.patch(make(), families="vq").replaced and mk.patch(make(), families=["vq"]).replaced
    handle = mk.patch(make(), families=[])
    assert not handle.replaced and "no module or scheduler here is known" in handle.report()
    assert {rule.family for rule in RULES} == {"blocks", "modulation", "vq"}


def test_strict():
    with pytest.raises(RuntimeError, match=r"strict=True, and nothing to replace:\nmk.patch: 0 replaced"):
        mk.patch(nn.Linear(1, 1), strict=True)
    good, bad = make(), make()
    bad.embedding = nn.Embedding(9, 4, sparse=True)
    with pytest.raises(RuntimeError, match=r"kept as they were:\n.*\n.*\n.*sparse=True"):
        mk.patch([good, bad], strict=True)
    assert "forward" not in vars(good)
    assert mk.patch([good, bad]).replaced


def test_report():
    bad = make()
    bad.embedding = nn.Embedding(9, 4, sparse=True)
    handle = mk.patch({"good": make(), "bad": bad, "unchecked": nn.Linear(1, 1)}, verify=False)
    assert str(handle) == handle.report() and handle.report().splitlines() == [
        "mk.patch: 1 replaced, 1 kept",
        "  replaced good (VectorQuantizer2) by mk.vector_quantize, not verified",
        "  kept     bad (VectorQuantizer2): embedding has sparse=True",
        "  VectorQuantizer2 falls back to stock when: temp=, rescale_logits= or return_logits= is given; the embedding has hooks",
    ]


def test_a_forward_that_others_replaced():
    theirs = make()
    theirs.forward = lambda z: None
    handle = mk.patch(theirs)
    assert "its forward was already replaced on the instance, by function" in handle.kept[0].reasons
    handle.revert()
    assert theirs.forward(1) is None

    later, fine = make(), make()
    handle = mk.patch([later, fine])
    ours = later.forward
    later.forward = lambda *args: ours(*args)
    with pytest.raises(RuntimeError, match="cannot revert what was replaced again since: 0 by <function"):
        handle.revert()
    assert "forward" not in vars(fine)
    later.forward = ours
    handle.revert()
    assert "forward" not in vars(later)


def test_a_copy_serves_itself():
    """A closure over the original would run the original's codebook."""
    model = Model()
    mk.patch(model, strict=True)
    twin = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (twin, pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert other.quantize.forward.module is other.quantize
        with torch.no_grad():
            other.quantize.embedding.weight.fill_(7)
        assert (other.quantize(x())[0] == 7).all() and not (model.quantize(x())[0] == 7).any()


def test_a_copy_of_a_model_outlives_the_revert():
    model = make()
    handle = mk.patch(model)
    twin = copy.deepcopy(model)
    handle.revert()
    assert "forward" in vars(twin) and "already patched" in mk.patch(twin).report()


def test_parameters_that_move_or_are_swapped():
    module = make()
    mk.patch(module, strict=True)
    assert module.double()(x().double())[0].dtype == torch.float64
    module.float().load_state_dict({"embedding.weight": torch.full((9, 4), 3.0)})
    assert (module(x())[0] == 3).all()
    module.embedding.weight = nn.Parameter(torch.full((9, 4), 5.0))
    assert (module(x())[0] == 5).all()
    swapped = torch.func.functional_call(module, {"embedding.weight": torch.full((9, 4), 6.0)}, (x(),))
    assert (swapped[0] == 6).all()


def test_hooks_and_signature():
    module = make()
    seen = []
    module.register_forward_hook(lambda *a: seen.append(1))
    signature = inspect.signature(module.forward)
    with mk.patch(module):
        module(x())
        assert inspect.signature(module.forward) == signature
    assert seen == [1]


def test_no_library_is_imported():
    libraries = ("vector_quantize_pytorch", "diffusers", "taming", "einops")
    code = f"import sys, mmgen_kernels; assert not {{m.split('.')[0] for m in sys.modules}} & {{*{libraries}}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_kept_alive():
    module = make()
    mk.patch(module)
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None


@pytest.mark.unpoisoned
def test_compiled_as_one_graph():
    for module in (make(), VectorQuantizer(9, 4, 0.25, 0.0, True, False)):
        mk.patch(module, strict=True)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(x())[:1], module(x())[:1], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.unpoisoned
def test_exported():
    module = make().eval()
    mk.patch(module, strict=True)
    exported = torch.export.export(module, (x(),))
    assert any("mmgen_kernels.vector_quantize" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x())[0], module(x())[0])


@pytest.mark.unpoisoned
def test_patched_after_it_was_compiled():
    module = make()
    compiled = torch.compile(module, backend="eager")
    compiled(x())
    handle = mk.patch(module)
    called = []
    original = type(module.forward).__call__

    class Counting(type(module.forward)):
        def __call__(self, *args):
            called.append(1)
            return original(self, *args)

    module.forward.__class__ = Counting
    compiled(x())
    assert called
    handle.revert()
    del called[:]
    compiled(x())
    assert not called
