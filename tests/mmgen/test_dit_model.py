import math

import pytest
import torch

from mmgen.models import DiT, DiT_models, DiTConfig
from mmgen.models.dit import DiT_XL_2, position_embedding, timestep_embedding

OF_A_BLOCK = [
    f"{name}.{kind}"
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    for kind in ("weight", "bias")
]
GFLOPS = {  # table 1 and figure 2 of the paper, 256 x 256 pixels; a multiplication and an addition counted as one
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06, "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71, "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64,
}  # fmt: skip


def build(**options) -> DiT:
    torch.manual_seed(0)
    small = {"input_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    return DiT(DiTConfig(**(small | {"learn_sigma": False} | options)))


def awake(model: DiT) -> DiT:
    """Past the zeros that a model starts with, which hide what is before them."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch(size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return (
        torch.randn(size, 1, 8, 8, generator=draw),
        torch.rand(size, generator=draw) * 1000,
        torch.randint(0, 10, (size,), generator=draw),
    )


def test_state_dict_has_the_names_and_shapes_of_the_field():
    with torch.device("meta"):
        model = DiT_XL_2()
    embedders = {
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "pos_embed": (1, 256, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert set(found) == set(embedders) | {f"blocks.{n}.{name}" for n in range(28) for name in OF_A_BLOCK}
    assert {name: found[name] for name in embedders} == embedders


@pytest.mark.parametrize("name", DiT_models)
def test_configurations_of_the_paper(name):
    """Shapes and the multiplications of the paper's table, counted from the parameters and the attention."""
    with torch.device("meta"):
        model = DiT_models[name]()
        out = model(torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.int64))
    assert out.shape == (2, 8, 32, 32)
    config = model.config
    tokens, width = config.grid_size**2, config.hidden_size
    of_tokens = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "adaLN" not in n and "t_emb" not in n and "y_emb" not in n
    )
    of_samples = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and ("adaLN" in n or "t_emb" in n))
    multiplications = tokens * of_tokens + of_samples + config.depth * 2 * tokens**2 * width
    assert multiplications / 1e9 == pytest.approx(GFLOPS[name], rel=0.02, abs=0.005)


@pytest.mark.parametrize("options", [{}, {"patch_size": 1}, {"patch_size": 4, "in_channels": 3, "learn_sigma": True}])
def test_shapes(options):
    model = awake(build(**options))
    x, t, y = batch()
    channels = model.config.in_channels
    out = model(x.expand(-1, channels, -1, -1), t, y)
    assert out.shape == (3, channels * (2 if model.config.learn_sigma else 1), 8, 8)
    whole = model(x.expand(-1, channels, -1, -1), t.long(), y)
    assert torch.equal(whole, model(x.expand(-1, channels, -1, -1), t.long().float(), y))


def test_positions_are_sines_of_the_column_and_then_of_the_row():
    embedding = position_embedding(16, 5)
    assert embedding.shape == (25, 16)
    row, column, i = 3, 2, 1
    frequency = 10000 ** (-i / 4)
    token = embedding[row * 5 + column]
    assert token[i] == pytest.approx(math.sin(column * frequency))
    assert token[4 + i] == pytest.approx(math.cos(column * frequency))
    assert token[8 + i] == pytest.approx(math.sin(row * frequency))
    assert token[12 + i] == pytest.approx(math.cos(row * frequency))


def test_times_are_cosines_and_then_sines():
    embedding = timestep_embedding(torch.tensor([0.0, 37.5]), 8)
    assert embedding[0].tolist() == [1.0] * 4 + [0.0] * 4
    expected = [f(37.5 * 10000 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)]
    torch.testing.assert_close(embedding[1], torch.tensor(expected))


def test_it_begins_as_zero_and_every_block_as_the_identity():
    model = build().eval()
    x, t, y = batch()
    assert not model(x, t, y).any()
    tokens = torch.randn(3, 16, 32)
    assert torch.equal(model.blocks[1](tokens, torch.randn(3, 32)), tokens)


def test_patches_lie_where_they_were():
    model = build(patch_size=2, in_channels=3)
    pixels = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    patches = pixels.view(2, 3, 4, 2, 4, 2)  # (B, C, row, p, column, q)
    tokens = torch.stack(
        [patches[:, :, r, :, c, :].permute(0, 2, 3, 1).flatten(1) for r in range(4) for c in range(4)], dim=1
    )  # (B, T, p * q * C)
    assert torch.equal(model.unpatchify(tokens), pixels)
    model.x_embedder.proj.weight.data.zero_()
    model.x_embedder.proj.weight.data[0, 1, 0, 1] = 1  # channel 1 of the upper right pixel
    assert torch.equal(model.x_embedder(pixels)[:, 4 * 2 + 3, 0], pixels[:, 1, 2 * 2, 2 * 3 + 1])


def test_everything_that_it_is_given_counts():
    model = awake(build())
    x, t, y = batch()
    out = model(x, t, y)
    for changed in (model(x + 1, t, y), model(x, t + 10, y), model(x, t, (y + 1) % 10), model(x, t, torch.full_like(y, 10))):
        assert (changed - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    alone = model(x[1:2], t[1:2], y[1:2])
    torch.testing.assert_close(alone, out[1:2])


def test_every_parameter_learns():
    model = awake(build()).train()
    model.y_embedder.dropout_prob = 0.5
    x, t, y = batch(8)
    model(x, t, y).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.y_embedder.embedding_table.weight.grad[10].any()  # of the label that stands for none


def test_labels_are_dropped_in_training_only():
    embedder = build(class_dropout_prob=0.25).y_embedder
    labels = torch.zeros(4000, dtype=torch.int64)
    absent = embedder.embedding_table.weight[10]
    share = (embedder.train()(labels) == absent).all(dim=1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    assert not (embedder.eval()(labels) == absent).all(dim=1).any()


def test_a_model_without_dropped_labels_has_no_row_for_them():
    model = build(class_dropout_prob=0.0)
    assert model.y_embedder.embedding_table.weight.shape == (10, 32)
    with pytest.raises(ValueError, match="class_dropout_prob 0 knows no absent label"):
        _ = model.no_label
    assert build().no_label == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "input_size must be divisible by patch_size 3, got 8"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_built_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_another_size_of_image_is_refused():
    x, t, y = batch()
    with pytest.raises(ValueError, match=r"x must be \(B, 1, 8, 8\), got \(3, 1, 4, 4\)"):
        build()(x[:, :, :4, :4], t, y)
