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
def test_entropy(l2_norm):
    module = make(l2_norm, entropy_loss_ratio=0.1).double()  # at temperature 0.01 rounding in fp32 shows a hundredfold
    with torch.no_grad():  # not so far apart that every probability is 0 or 1
        module.embedding.weight.mul_(0.3 if l2_norm else 0.1)
    ours = copy.deepcopy(module)
    mk.patch(ours, strict=True)

    def small():
        return inputs().double() * 0.1

    assert_same_training(trained(ours, small), trained(module, small))


def test_entropy_in_fp32_is_verified():
    with mk.patch(make(entropy_loss_ratio=0.1), strict=True) as handle:
        assert handle.replaced[0].verified


@pytest.mark.parametrize("frozen", ("input", "codebook", "both"))
def test_what_wants_no_gradient_gets_none(frozen):
    module = make().requires_grad_(frozen == "input")
    ours = copy.deepcopy(module)
    mk.patch(ours, strict=True)
    z = inputs().requires_grad_(frozen == "codebook")
    for training in (True, False):
        found, expected = (side.train(training)(z) for side in (ours, module))
        for a, b in zip(*(torch.utils._pytree.tree_leaves(v) for v in (found, expected)), strict=True):
            assert not torch.is_tensor(b) or a.requires_grad == b.requires_grad


def test_usage_buffer_after_a_move():
    """A buffer that was registered as a Parameter is no leaf any more once the module has been moved."""
    module, ours = make(), make()
    ours.codebook_used = torch.zeros(65536, requires_grad=True) * 1
    assert not ours.codebook_used.is_leaf
    mk.patch(ours, strict=True)
    history = ours.codebook_used.grad_fn
    for _ in range(3):
        z = inputs()
        assert ours(z)[1][3] == module(z)[1][3]
    assert torch.equal(ours.codebook_used, module.codebook_used)
    assert ours.codebook_used.grad_fn is history  # it does not grow by a node per step
