"""mk.patch on VectorQuantizer2 of taming-transformers, by a twin with its structure."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from twins import VectorQuantizer, VectorQuantizer2, assert_same_training, trained

import mmgen_kernels as mk
from mmgen_kernels.patching.verification import Lookups


def inputs():
    return torch.randn(2, 4, 3, 5)


def make(**options):
    torch.manual_seed(0)
    return VectorQuantizer2(9, 4, **({"beta": 0.25} | options))


@pytest.fixture
def remap(tmp_path):
    np.save(tmp_path / "used.npy", np.array([2, 3, 5, 7]))
    return str(tmp_path / "used.npy")


@pytest.mark.parametrize("options", ({}, {"legacy": False}, {"beta": 2.0, "sane_index_shape": True}), ids=str)
def test_served(options):
    module = make(**options)
    ours = copy.deepcopy(module)
    handle = mk.patch(ours, strict=True)
    assert handle.replaced[0].verified
    with Lookups() as seen:
        results = trained(ours, inputs)
    assert len(seen.seen) == 4
    assert_same_training(results, trained(module, inputs))


@pytest.mark.parametrize("unknown", ("random", 3))
@pytest.mark.parametrize("sane", (False, True))
def test_remapped_indices(remap, unknown, sane):
    module = make(remap=remap, unknown_index=unknown, sane_index_shape=sane)
    ours = copy.deepcopy(module)
    mk.patch(ours, strict=True)
    assert_same_training(trained(ours, inputs), trained(module, inputs))


def test_arguments_of_a_call():
    module = make()
    mk.patch(module, strict=True)
    z = inputs()
    with Lookups() as seen:
        module(z, None, False)
        module(z, temp=None, return_logits=False)
    assert len(seen.seen) == 2
    with Lookups() as seen:
        module(z, 1.0)
        for wrong in ({"temp": 0.0}, {"temp": 2.0}, {"return_logits": True}):
            with pytest.raises(AssertionError):
                module(z, **wrong)
    assert not seen.seen


def test_codes_of_an_input_without_gradient_want_none():
    module = make()
    mk.patch(module, strict=True)
    for z in (inputs(), inputs().requires_grad_()):
        quantized, loss, _ = module(z)
        assert quantized.requires_grad == z.requires_grad and loss.requires_grad


def test_memory_formats_and_strides():
    module = make()
    ours = copy.deepcopy(module)
    mk.patch(ours, strict=True)
    for z in (inputs().to(memory_format=torch.channels_last), inputs().expand(3, 2, 4, 3, 5)[1], inputs()[:, :, ::2]):
        for a, b in zip(ours(z)[:2], module(z)[:2], strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize(("codes", "shape"), ((1, (2, 4, 3, 5)), (9, (1, 4, 1, 1)), (9, (0, 4, 3, 5)), (9, (2, 1, 3, 5))))
def test_small_sizes(codes, shape):
    module = VectorQuantizer2(codes, shape[1], 0.25)
    ours = copy.deepcopy(module)
    mk.patch(ours, strict=True)
    z = torch.randn(shape)
    found, expected = (torch.utils._pytree.tree_leaves(side(z)) for side in (ours, module))
    assert found[2:4] == expected[2:4] == [None, None] and torch.equal(found[4], expected[4])
    torch.testing.assert_close(found[0], expected[0])
    if z.numel():  # stock's mean over nothing is NaN
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_dtypes(dtype):
    module = make().to(dtype)
    ours = copy.deepcopy(module)
    handle = mk.patch(ours)
    if dtype == torch.bfloat16:  # stock's distances in bf16 are too coarse to find the nearest code
        assert handle.replaced or "near ties" in handle.kept[0].reasons[0]
        mk.patch(ours, verify=False)
    z = inputs().to(dtype)
    quantized, loss, (_, _, indices) = ours(z)
    stock = module(z)
    assert quantized.dtype == stock[0].dtype and loss.dtype == stock[1].dtype
    rows = z.movedim(1, -1).reshape(-1, 1, 4).double()
    assert torch.equal(indices, (rows - module.embedding.weight.double()).square().sum(-1).argmin(1))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("make", (make, lambda: VectorQuantizer(9, 4, 0.25, 0.0, True, True)), ids=("taming", "llamagen"))
def test_dtypes_under_autocast(make, dtype):
    module = make()
    ours = copy.deepcopy(module)
    mk.patch(ours, strict=True)
    z = inputs().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (torch.utils._pytree.tree_leaves(side(z)) for side in (ours, module))
    for a, b in zip(found, expected, strict=True):
        assert not torch.is_tensor(b) or (a.dtype, a.shape) == (b.dtype, b.shape)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"padding_idx": 2}, "padding_idx=2"),
        ({"sparse": True}, "sparse=True"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
    ],
)
def test_embeddings_that_are_more_than_a_matrix(change, reason):
    module = make()
    module.embedding = nn.Embedding(9, 4, **change)
    assert reason in mk.patch(module).kept[0].reasons[0]


def test_other_structures():
    module = make()
    module.embedding = nn.Embedding(7, 4)
    assert "shape (7, 4), expected (9, 4)" in mk.patch(module).report()
    module.embedding = nn.Linear(4, 9)
    assert "is a Linear" in mk.patch(module).report()
    module = make()
    module.beta = torch.tensor(0.25)
    assert "beta is a Tensor" in mk.patch(module).report()
    module = make()
    del module.legacy  # the first VectorQuantizer, which returns a one-hot matrix
    assert not mk.patch(module).kept and not mk.patch(module).replaced


def test_hooks_on_the_embedding_are_called():
    module = make()
    mk.patch(module, strict=True)
    seen = []
    module.embedding.register_forward_hook(lambda *a: seen.append(1))
    module(inputs())
    assert seen == [1]
