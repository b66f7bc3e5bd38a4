"""mk.patch on LlamaGen's VectorQuantizer, by a twin with its structure."""

import copy

import pytest
import torch
from twins import VectorQuantizer, assert_same_training, trained

import mmgen_kernels as mk
from mmgen_kernels.patching.verification import Lookups


def inputs():
    return torch.randn(2, 4, 3, 5)


def make(l2_norm=True, show_usage=True, entropy_loss_ratio=0.0):
    torch.manual_seed(0)
    return VectorQuantizer(9, 4, 0.25, entropy_loss_ratio, l2_norm, show_usage)


@pytest.mark.parametrize("l2_norm", (True, False))
@pytest.mark.parametrize("show_usage", (True, False))
def test_served(l2_norm, show_usage):
    module = make(l2_norm, show_usage)
    ours = copy.deepcopy(module)
    mk.patch(ours, strict=True)
    with Lookups() as seen:
        results = trained(ours, inputs)
    assert len(seen.seen) == 4
    assert_same_training(results, trained(module, inputs))


@pytest.mark.parametrize("l2_norm", (True, False))
def test_entropy_is_served_where_the_operator_is_there(l2_norm):
    module = make(l2_norm, entropy_loss_ratio=0.1)
    ours = copy.deepcopy(module)
    handle = mk.patch(ours)
    if not hasattr(mk, "code_entropy"):
        assert handle.kept[0].reasons == ("entropy_loss_ratio != 0 reads all distances",)
        return
    assert handle.replaced, handle.report()
    assert_same_training(trained(ours, inputs), trained(module, inputs))


def test_usage_buffer_after_a_move():
    """A buffer that was registered as a Parameter is no leaf any more once the module has been moved."""
    module, ours = make(), make()
    ours.codebook_used = torch.zeros(65536, requires_grad=True) * 1
    assert not ours.codebook_used.is_leaf
    mk.patch(ours, strict=True)
    for _ in range(3):
        z = inputs()
        assert ours(z)[1][3] == module(z)[1][3]
    assert torch.equal(ours.codebook_used, module.codebook_used)
