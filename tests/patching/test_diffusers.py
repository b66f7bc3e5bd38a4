"""mk.patch on diffusers' VectorQuantizer: by a twin of its structure, and by itself where it is installed."""

import copy

import numpy as np
import pytest
import torch
from twins import DiffusersVectorQuantizer, assert_same_training, trained

import mmgen_kernels as mk

VARIANTS = (
    {},
    {"legacy": False},
    {"sane_index_shape": True},
    {"remap": True, "unknown_index": "random"},
    {"remap": True, "unknown_index": "extra"},
)


def inputs():
    return torch.randn(2, 4, 3, 5)


@pytest.fixture(params=("twin", "diffusers"))
def variant(request):
    if request.param == "twin":
        return DiffusersVectorQuantizer
    return pytest.importorskip("diffusers.models.autoencoders.vae").VectorQuantizer


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_served(variant, tmp_path, options):
    if options.get("remap"):
        np.save(tmp_path / "used.npy", np.array([2, 3, 5, 7]))
        options = options | {"remap": str(tmp_path / "used.npy")}
        if options["unknown_index"] == "extra" and variant is DiffusersVectorQuantizer:
            options["unknown_index"] = 4  # what the library makes of it
    torch.manual_seed(0)
    module = variant(9, 4, beta=0.25, **options)
    torch.nn.init.normal_(module.embedding.weight)  # the library starts with codes in a heap around 0
    ours = copy.deepcopy(module)
    handle = mk.patch(ours, strict=True)
    assert handle.replaced[0].kind == "VectorQuantizer" and handle.replaced[0].verified
    assert_same_training(trained(ours, inputs), trained(module, inputs))


def test_a_subclass_with_its_own_forward_is_kept(variant):
    class Mine(variant):
        def forward(self, z):
            return super().forward(2 * z)

    handle = mk.patch(Mine(9, 4, beta=0.25))
    assert "Mine overrides VectorQuantizer.forward" in handle.kept[0].reasons


def test_a_subclass_that_adds_is_served(variant):
    class Mine(variant):
        pass

    assert mk.patch(Mine(9, 4, beta=0.25)).replaced


def test_in_a_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.VQModel(block_out_channels=(32,), num_vq_embeddings=9, norm_num_groups=8).eval()
    x = torch.randn(1, 3, 8, 8)
    stock = model(x).sample
    with mk.patch(model, strict=True) as handle:
        assert [r.name for r in handle.replaced] == ["quantize"]
        torch.testing.assert_close(model(x).sample, stock)
