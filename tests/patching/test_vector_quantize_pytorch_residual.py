"""mk.patch on what vector-quantize-pytorch makes of its quantizer: residual, grouped, hierarchical, by random projection."""

import copy
import inspect

import pytest
import torch
from twins import assert_same_training, trained
from twins_vector_quantize import CODES, DIM, MASK, inputs, patched

import mmgen_kernels as mk

pytest.importorskip("vector_quantize_pytorch")
from vector_quantize_pytorch import GroupedResidualVQ, HierarchicalVQ, RandomProjectionQuantizer, ResidualVQ

RESIDUAL = {
    "dim": [{}],
    "num_quantizers": [{"num_quantizers": 4}],
    "codebook_size": [{"codebook_size": (7, 5), "num_quantizers": None}],
    "codebook_dim": [{"codebook_dim": 4}],
    "shared_codebook": [
        {"shared_codebook": True},
        # codes that are rows leave residuals that are nothing but rounding, which the rotation trick would blow up
        {"shared_codebook": True, "threshold_ema_dead_code": 2, "kmeans_init": True, "rotation_trick": False},
    ],
    "diveq": [{"diveq": True}],
    "heads": [{"heads": 1}],
    "quantize_dropout": [{"quantize_dropout": True}],
    "quantize_dropout_cutoff_index": [{"quantize_dropout": True, "quantize_dropout_cutoff_index": 1}],
    "quantize_dropout_multiple_of": [{"quantize_dropout": True, "quantize_dropout_multiple_of": 2, "num_quantizers": 4}],
    "accept_image_fmap": [{"accept_image_fmap": True}],
    "mlp_kwargs": [{"mlp_kwargs": {"depth": 1}}],  # of MLPs that only implicit_neural_codebook makes
    "beam_score_quantizer_weights": [{"beam_score_quantizer_weights": [1.0, 0.5, 0.25]}],  # of a search that is off
    "quant_grad_frac": [{"quant_grad_frac": 0.5}],
    "return_zeros_for_masked_padding": [{"return_zeros_for_masked_padding": False}],
    "vq_kwargs": [{"kmeans_init": True, "threshold_ema_dead_code": 2, "use_cosine_sim": True}],
}
RESIDUAL_NOT_SERVED = {
    "implicit_neural_codebook": {"implicit_neural_codebook": True},
    "beam_size": {"beam_size": 2},
    "eval_beam_size": {"beam_size": 1, "eval_beam_size": 3},
}


def make_residual(**options):
    torch.manual_seed(0)
    options = {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3} | options
    return ResidualVQ(**options)


@pytest.mark.parametrize(
    "options", [pytest.param(c, id=f"{name}-{i}") for name, cases in RESIDUAL.items() for i, c in enumerate(cases)]
)
def test_residual_served(options):
    module = make_residual(**options)
    ours, handle = patched(module)
    assert len(handle.replaced) == len(module.layers) and not handle.kept, handle.report()
    shape = inputs(module)
    assert_same_training(trained(ours, shape), trained(module, shape))


@pytest.mark.parametrize("name", RESIDUAL_NOT_SERVED)
def test_residual_not_served_by_name(name):
    module = make_residual(**RESIDUAL_NOT_SERVED[name])
    ours, handle = patched(module)
    assert not handle.replaced and len(handle.kept) == 1 and name in handle.kept[0].reasons[-1]
    assert_same_training(trained(ours, inputs(module)), trained(module, inputs(module)))


def test_the_residual_table_has_every_option():
    assert set(inspect.signature(ResidualVQ.__init__).parameters) == {*RESIDUAL, *RESIDUAL_NOT_SERVED, "self"}


@pytest.mark.parametrize(
    "call",
    ({"mask": MASK}, {"freeze_codebook": True}, {"return_all_codes": True}, {"rand_quantize_dropout_fixed_seed": 3},
     {"beam_size": 2}),
    ids=lambda call: next(iter(call)),
)
def test_residual_calls(call):
    module = make_residual(quantize_dropout="rand_quantize_dropout_fixed_seed" in call)
    ours, _ = patched(module)
    assert_same_training(trained(ours, inputs(module), calls=(call, {})), trained(module, inputs(module), calls=(call, {})))


def test_residual_with_indices_fails_as_stock_does():
    """Version 1.32 takes three results of a layer that gives two. A version that does not takes the stock road."""
    module = make_residual()
    ours, _ = patched(module)
    for side in (ours, module):
        with pytest.raises(ValueError, match="not enough values to unpack"):
            side(torch.randn(2, 13, DIM), indices=torch.ones(2, 13, 3, dtype=torch.int64))


def test_what_else_is_made_of_it():
    torch.manual_seed(0)
    hierarchical = HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 3, 13))
    grouped = GroupedResidualVQ(dim=DIM, groups=2, num_quantizers=2, codebook_size=CODES)
    projection = RandomProjectionQuantizer(dim=DIM, codebook_size=CODES, codebook_dim=4, num_codebooks=2)
    for module, layers in ((grouped, 4), (projection, 1), (hierarchical, 1)):
        ours, handle = patched(module)
        assert len(handle.replaced) == layers and not handle.kept
        x = torch.randn(2, DIM, 13) if module is hierarchical else torch.randn(2, 13, DIM)
        for _ in range(2):
            torch.manual_seed(1)
            stock = module(x)
            torch.manual_seed(1)
            found = ours(x)
            for a, b in zip(*(torch.utils._pytree.tree_leaves(v) for v in (found, stock)), strict=True):
                assert a is b is None or torch.testing.assert_close(a, b) is None


def test_reverted_to_the_bit():
    module = make_residual(shared_codebook=True, kmeans_init=True)
    before = [dict(vars(m)) for m in module.modules()]
    values = copy.deepcopy(module.state_dict())
    with mk.patch(module) as handle:
        assert len(handle.replaced) == 3
        assert list(module.state_dict()) == list(values)
    for m, was in zip(module.modules(), before, strict=True):
        assert list(vars(m)) == list(was) and all(vars(m)[name] is value for name, value in was.items())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in values.items())


def test_a_copy_serves_itself():
    module = make_residual()
    mk.patch(module)
    twin = copy.deepcopy(module).eval()
    x = torch.randn(2, 13, DIM)
    twin(x)
    for layer in twin.layers:
        layer._codebook.embed.fill_(2.0)
    assert (twin(x)[0] == 6).all() and not (module.eval()(x)[0] == 6).any()
