"""mk.patch on vector-quantize-pytorch: every option is served as stock serves it, or named as not served."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import assert_same_training, trained
from twins_vector_quantize import CODES, DIM, MASK, inputs, patched

import mmgen_kernels as mk
from mmgen_kernels.patching.verification import Lookups

pytest.importorskip("vector_quantize_pytorch")
from vector_quantize_pytorch import VectorQuantize

LEARNABLE = {"learnable_codebook": True, "ema_update": False}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


class Bridge(nn.Module):
    def forward(self, codes):
        return codes + 1


# option -> configurations that exercise it. The keys together with NOT_SERVED are all arguments of the constructor.
SERVED = {
    "codebook_dim": [{"codebook_dim": 5}],
    "heads": [{"heads": 2, "codebook_dim": 4}, {"heads": 2, "codebook_dim": 3}],
    "separate_codebook_per_head": [{"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}],
    "decay": [{"decay": 0.3}],
    "eps": [{"eps": 0.1}],
    "freeze_codebook": [{"freeze_codebook": True}],
    "kmeans_init": [{"kmeans_init": True}, {"kmeans_init": True, "use_cosine_sim": True}],
    "kmeans_iters": [{"kmeans_init": True, "kmeans_iters": 2, "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}],
    "sync_kmeans": [{"kmeans_init": True, "sync_kmeans": False}],
    "use_cosine_sim": [{"use_cosine_sim": True}, {"use_cosine_sim": True, "heads": 2, "codebook_dim": 4}],
    "layernorm_after_project_in": [{"codebook_dim": 5, "layernorm_after_project_in": True}],
    "threshold_ema_dead_code": [
        {"threshold_ema_dead_code": 2},
        {"threshold_ema_dead_code": 2, "use_cosine_sim": True},
        {"threshold_ema_dead_code": 2, "ema_update": False},
        {"threshold_ema_dead_code": 2, **LEARNABLE},
    ],
    "channel_last": [{"channel_last": False}],
    "accept_image_fmap": [{"accept_image_fmap": True}],
    "accept_3d_fmap": [{"accept_3d_fmap": True}],
    "commitment_weight": [{"commitment_weight": 0.0}, {"commitment_weight": 0.3}],
    "orthogonal_reg_weight": [{"orthogonal_reg_weight": 0.5}],
    "orthogonal_reg_active_codes_only": [{"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True}],
    "orthogonal_reg_max_codes": [{"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": 5}],
    "codebook_diversity_temperature": [{"codebook_diversity_temperature": 10.0}],  # of a loss that is off
    "sample_codebook_temp": [{"sample_codebook_temp": 0.3}],  # of sampling that is off
    "rotation_trick": [{"rotation_trick": False}, {"rotation_trick": True}],
    "directional_reparam": [{"directional_reparam": True, "threshold_ema_dead_code": 1}],
    "directional_reparam_variance": [
        {"directional_reparam": True, "directional_reparam_variance": 0.1, "threshold_ema_dead_code": 1}
    ],
    "sync_codebook": [{"sync_codebook": False}],  # True: test_synchronised
    "sync_affine_param": [{"affine_param": True, "sync_affine_param": False}],  # True: test_synchronised
    "ema_update": [{"ema_update": False}],
    "manual_ema_update": [{"manual_ema_update": True}],
    "learnable_codebook": [LEARNABLE, {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, **LEARNABLE}],
    "in_place_codebook_optimizer": [
        {"in_place_codebook_optimizer": sgd, **LEARNABLE},
        {"in_place_codebook_optimizer": sgd, "threshold_ema_dead_code": 2, **LEARNABLE},  # its second lookup must not count
    ],
    "manual_in_place_optimizer_update": [
        {"in_place_codebook_optimizer": sgd, "manual_in_place_optimizer_update": True, **LEARNABLE}
    ],
    "affine_param": [{"affine_param": True}, {"affine_param": True, **LEARNABLE}],
    "affine_param_batch_decay": [{"affine_param": True, "affine_param_batch_decay": 0.5}],
    "affine_param_codebook_decay": [{"affine_param": True, "affine_param_codebook_decay": 0.5}],
    "sync_update_v": [{"sync_update_v": 0.4, **LEARNABLE}],
    "return_zeros_for_masked_padding": [{"return_zeros_for_masked_padding": False}],
    "route_gradients_to_input": [{"route_gradients_to_input": False}],
}
NOT_SERVED = {
    "commitment_use_cross_entropy_loss": {"commitment_use_cross_entropy_loss": True},
    "codebook_diversity_loss_weight": {"codebook_diversity_loss_weight": 0.1},
    "stochastic_sample_codes": {"stochastic_sample_codes": True},
    "straight_through": {"straight_through": True, "rotation_trick": False},
    "vq_bridge": {"vq_bridge": Bridge(), "rotation_trick": False},
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return VectorQuantize(DIM, CODES, **options)


def compare(module, calls=({},), lookups=True):
    """Trains stock and patched from the same seed."""
    ours, handle = patched(module)
    assert handle.replaced and not handle.kept, handle.report()
    with Lookups() as seen:
        results = trained(ours, inputs(module), calls=calls)
    assert bool(seen.seen) == lookups
    assert_same_training(results, trained(module, inputs(module), calls=calls))


@pytest.mark.parametrize(
    "options", [pytest.param(c, id=f"{name}-{i}") for name, cases in SERVED.items() for i, c in enumerate(cases)]
)
def test_served(options):
    compare(make(**options))


@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served_by_name(name):
    module = make(**NOT_SERVED[name])
    before = dict(vars(module))
    handle = mk.patch(module)
    assert not handle.replaced and name in handle.kept[0].reasons[0] and name in handle.report()
    assert dict(vars(module)) == before


def test_the_table_has_every_option():
    known = {*SERVED, *NOT_SERVED, "self", "dim", "codebook_size"}
    assert set(inspect.signature(VectorQuantize.__init__).parameters) == known


# -- arguments of a call ----------------------------------------------------------------------------------------------

CALLS = {  # argument -> (module's options, call's options, served by us)
    "mask": [({}, {"mask": MASK}, True), ({"kmeans_init": True}, {"mask": MASK}, True),
             ({"threshold_ema_dead_code": 2}, {"mask": MASK}, True),
             ({"affine_param": True}, {"mask": MASK}, True),
             ({"return_zeros_for_masked_padding": False}, {"mask": MASK}, True),
             ({"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True}, {"mask": MASK}, True),
             ({"heads": 2, "codebook_dim": 4, "commitment_weight": 0.0}, {"mask": MASK}, True),
             ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "commitment_weight": 0.0, "kmeans_init": True},
              {"mask": MASK}, True)],
    "lens": [({}, {"lens": torch.tensor([13, 4])}, True)],
    "sample_codebook_temp": [({}, {"sample_codebook_temp": 0.2}, True)],
    "freeze_codebook": [({}, {"freeze_codebook": True}, True), ({"freeze_codebook": True}, {"freeze_codebook": False}, True)],
    "return_loss_breakdown": [({"orthogonal_reg_weight": 0.5}, {"return_loss_breakdown": True}, True)],
    "ema_update": [({}, {"ema_update": False}, True), ({"threshold_ema_dead_code": 2}, {"ema_update": False}, True),
                   ({"ema_update": False}, {"ema_update": True}, True)],
    "indices": [({}, {"indices": torch.arange(26).view(2, 13) % CODES}, False)],
    "topk": [({}, {"topk": 3}, False)],
    "codebook_transform_fn": [({}, {"codebook_transform_fn": lambda e: e[:, None, None].expand(-1, 2, 13, -1, -1) * 2}, False)],
    "ema_update_weight": [({}, {"ema_update_weight": torch.full((1, CODES), 0.5)}, False)],
    "accum_ema_update": [({}, {"accum_ema_update": True}, False)],
}


@pytest.mark.parametrize(
    ("options", "call", "served"), [pytest.param(*c, id=f"{name}-{i}") for name, cs in CALLS.items() for i, c in enumerate(cs)]
)
def test_calls(options, call, served):
    compare(make(**options), calls=(call,), lookups=served)


def test_the_table_has_every_argument_of_a_call():
    assert set(inspect.signature(VectorQuantize.forward).parameters) == {*CALLS, "self", "x"}


def test_accumulated_sums_are_used_by_the_next_served_call():
    compare(make(), calls=({"accum_ema_update": True}, {}))


def test_a_fallback_leaves_no_trace_in_the_next_call():
    compare(make(), calls=({"topk": 2}, {}, {"indices": torch.zeros(2, 13, dtype=torch.int64)}, {}))


def test_one_token():
    module = make()
    ours, _ = patched(module)
    x = torch.randn(5, DIM)
    for a, b in zip(ours(x), module(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dim", "codes", "rows"), ((1, 1, 4), (1, 7, 4), (5, 1, 4), (5, 7, 1), (5, 7, 0)))
def test_small_sizes(dim, codes, rows):
    torch.manual_seed(0)
    module = VectorQuantize(dim, codes, threshold_ema_dead_code=2 if rows else 0)
    ours, handle = patched(module)
    assert handle.replaced, handle.report()
    results, stock = (trained(side, lambda: torch.randn(2, rows, dim)) for side in (ours, module))
    for name, expected in stock.items():
        if torch.is_tensor(expected):
            torch.testing.assert_close(results[name], expected, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("option", ("commitment_use_cross_entropy_loss", "has_codebook_diversity_loss"))
def test_a_loss_switched_on_after_patching(option):
    module = make()
    ours, _ = patched(module)
    setattr(module, option, True)
    setattr(ours, option, True)
    assert_same_training(trained(ours, inputs(module)), trained(module, inputs(module)))


def test_hooks_on_the_codebook_are_called():
    module, _ = patched(make())
    seen = []
    module._codebook.register_forward_hook(lambda m, args, output: seen.append(output[2].shape))
    module(torch.randn(2, 13, DIM))
    assert seen == [(1, 2, 13, CODES)]  # with the distances


def test_indices_are_exact_where_stock_rounds():
    """Two codes whose distances to x differ by less than stock's square root in fp32 can tell: stock takes the first."""
    module = VectorQuantize(2, 2, ema_update=False).eval()
    module.codebook = torch.tensor([[1.0, 0.0], [1.0 - 2.0**-22, 0.0]])
    x = torch.zeros(1, 1, 2) - torch.tensor([0.0, 1000.0])
    ours, _ = patched(module, verify=False)
    assert module(x)[1].item() == 0 and ours(x)[1].item() == 1


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_dtypes_of_input_and_module(dtype):
    x = torch.randn(2, 13, DIM).to(dtype)
    for module in (make(), make(threshold_ema_dead_code=2, heads=2, codebook_dim=3).to(dtype), make().to(dtype)):
        ours, handle = patched(module)
        assert handle.replaced, handle.report()
        x = x.to(dtype if module.has_projections else x.dtype)
        torch.manual_seed(1)
        found = ours(x)
        torch.manual_seed(1)
        for a, b in zip(found, module(x), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours._codebook.embed, module._codebook.embed)


def test_k_means_with_equal_rows():
    """Several codes start from one point and all but one stay there, unchosen, rather than move to 0 among the other rows."""
    module = make(kmeans_init=True)
    ours, _ = patched(module)
    x = torch.randn(2, 40, DIM)
    x[0] = 5.0
    for side in (ours, module):
        torch.manual_seed(0)
        side(x)
    torch.testing.assert_close(ours._codebook.embed, module._codebook.embed)
    assert module._codebook.cluster_size.min() < 1


def test_cosine_with_codes_that_are_not_normalised():
    """Stock takes the largest product, not the nearest direction."""
    module = make(use_cosine_sim=True).eval()
    module.codebook = torch.randn(CODES, DIM)
    ours, _ = patched(module)
    x = torch.randn(2, 200, DIM)
    assert torch.equal(ours(x)[1], module(x)[1])


def test_k_means_of_more_codes_than_verification_has_rows():
    """Many codes would start as one row, where stock takes any: a tie, and no reason to keep the module."""
    assert mk.patch(VectorQuantize(DIM, 512, kmeans_init=True, use_cosine_sim=True, threshold_ema_dead_code=2)).replaced


def test_rows_with_nan_spoil_no_other_code():
    """Stock multiplies them by the zeros of a one-hot matrix, and loses the whole codebook."""
    module = make()
    ours, _ = patched(module)
    x = torch.randn(2, 13, DIM)
    x[0, 3] = torch.nan
    for side, lost in ((ours, 1), (module, CODES)):
        assert side(x)[1][0, 3] == 0
        assert side._codebook.embed.isnan().any(-1).sum() == lost


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_dtypes_under_autocast(dtype):
    module = make(codebook_dim=5)
    ours, _ = patched(module)
    x = torch.randn(2, 13, DIM).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(ours(x), module(x), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)


# -- what it is for ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest number of elements that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(
    "options",
    ({}, {"use_cosine_sim": True, "threshold_ema_dead_code": 2}, {"kmeans_init": True}, {"affine_param": True}, LEARNABLE),
    ids=str,
)
def test_never_a_matrix_of_rows_and_codes(options):
    module = VectorQuantize(2, 61, **options)
    ours, _ = patched(module)
    sizes = []
    for side in (ours, module):
        with Largest() as largest:
            x = torch.randn(1, 67, 2, requires_grad=True)
            quantized, _, loss = side.train()(x)
            (quantized.sum() + loss).backward()
            side.eval()(x)
        sizes.append(largest.elements)
    assert sizes[0] < 1000 and sizes[1] >= 61 * 67


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", ({}, {"kmeans_init": True}, {"affine_param": True, "sync_affine_param": True}), ids=str)
def test_synchronised(one_process, monkeypatch, options):
    module = make(sync_codebook=True, threshold_ema_dead_code=0, **options)
    reduced = []
    original = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, *a, **k: (reduced.append(tuple(t.shape)), original(t, *a, **k)))
    for name in ("all_reduce_fn", "kmeans_all_reduce_fn"):
        setattr(module._codebook, name, torch.distributed.all_reduce)
    ours, handle = patched(module)
    assert handle.replaced and not reduced, "verification spoke to other processes"
    results = trained(ours, inputs(module))
    first, reduced[:] = list(reduced), []
    assert_same_training(results, trained(module, inputs(module)))
    assert first == reduced and (1, CODES) in first and (1, CODES, DIM) in first


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
def test_compiles_with_no_more_graph_breaks_than_stock():
    module = make()
    ours, _ = patched(module)
    x = torch.randn(2, 13, DIM)
    breaks = []
    for side in (ours, module):
        torch._dynamo.reset()
        breaks.append(torch._dynamo.explain(copy.deepcopy(side))(x).graph_break_count)
    assert breaks[0] <= breaks[1]
    torch._dynamo.reset()
    for a, b in zip(torch.compile(ours, backend="aot_eager")(x), module(x), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours._codebook.embed, module._codebook.embed)
