import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgen.data import DataConfig, StepSampler, load
from mmgen.data.crops import MiddleCrops, Pictures, RandomCrops, Tiles

CROP = 16


@pytest.fixture
def columns(tmp_path) -> Pictures:
    """One picture, 200 wide and 64 high, whose red is the column and whose green is the row."""
    pixels = np.zeros((64, 200, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(200)
    pixels[..., 1] = np.arange(64)[:, None]
    Image.fromarray(pixels).save(tmp_path / "columns.png")
    return Pictures([tmp_path / "columns.png"], short_side=64)


def columns_of(item: torch.Tensor) -> set[int]:
    return set(((item[0] + 1) * 127.5).round().int().flatten().tolist())


def test_training_never_touches_the_held_out_columns(columns):
    trained_on = RandomCrops(columns, CROP, seed=0, hold_out_middle=True)
    seen = set().union(*(columns_of(trained_on[i]) for i in range(400)))
    held_out = set().union(*(columns_of(item) for item in MiddleCrops(columns, CROP, rows=4)))
    assert held_out == set(range(92, 108))
    assert seen == set(range(200)) - held_out


def test_without_holding_out_the_middle_is_trained_on(columns):
    trained_on = RandomCrops(columns, CROP, seed=0)
    assert set().union(*(columns_of(trained_on[i]) for i in range(2000))) == set(range(200))


def test_middle_crops_reach_from_top_to_bottom(columns):
    rows = [((item[1, 0, 0] + 1) * 127.5).round().item() for item in MiddleCrops(columns, CROP, rows=4)]
    assert rows == [0, 16, 32, 48]


def test_tiles_cover_a_picture_once(columns):
    tiles = Tiles(columns, CROP)
    places = [tuple(((tile[:2, 0, 0] + 1) * 127.5).round().int().tolist()) for tile in tiles]  # column, row
    assert places == [(left, top) for top in (0, 16, 32, 48) for left in range(4, 196, 16)]
    assert len(tiles) == 48 and {tuple(tile.shape) for tile in tiles} == {(3, CROP, CROP)}


def test_unseen_photographs_come_in_three_parts_of_other_files():
    data = load(DataConfig("unseen-photographs", image_size=CROP), seed=0)
    names = [[path.name for path in part.pictures.paths] for part in (data.train, data.held_out, data.test)]
    assert names[1] == ["coffee.png", "motorcycle_left.png", "flower.jpg"]
    assert names[2] == ["chelsea.png", "moon.png", "china.jpg"]
    assert len(names[0]) == 9 and len(set().union(*names)) == 15
    assert "motorcycle_right.png" not in names[0]  # shows what is held out
    assert not data.train.hold_out_middle
    assert len(data.gallery) == 3
    everything = load(DataConfig("photographs", image_size=CROP), seed=0).train.pictures.paths
    assert {path.name for path in everything} == set().union(*names) - {"brick.png", "grass.png", "gravel.png"}


def test_no_two_parts_of_unseen_photographs_show_the_same():
    """Thumbnails of 8 x 8 tell the two views of the motorcycle for one picture, and no two photographs of other parts."""

    def likeness(a: Pictures, b: Pictures) -> torch.Tensor:
        small = torch.stack([F.adaptive_avg_pool2d(p.float(), 8).flatten() for part in (a, b) for p in part])  # (n, 192)
        return torch.corrcoef(small)[: len(a), len(a) :]

    data = load(DataConfig("unseen-photographs", image_size=CROP), seed=0)
    train, held_out, test = (part.pictures for part in (data.train, data.held_out, data.test))
    right_view = Pictures([held_out.paths[1].with_name("motorcycle_right.png")], held_out.short_side)
    assert likeness(held_out, right_view)[1] > 0.9
    for a, b in ((train, held_out), (train, test), (held_out, test)):
        assert likeness(a, b).max() < 0.7


@pytest.mark.parametrize(("dataset", "tested"), [("photographs", False), ("digits", False), ("unseen-photographs", True)])
def test_only_unseen_photographs_have_a_test_part(dataset, tested):
    assert (load(DataConfig(dataset, image_size=CROP), seed=0).test is not None) == tested


@pytest.mark.parametrize("dataset", ["photographs", "unseen-photographs", "digits"])
def test_an_item_is_the_same_whoever_asks(dataset):
    config = DataConfig(dataset, image_size=CROP)
    here, there = load(config, seed=3).train, load(config, seed=3).train
    asked = [700, 3, 41, 3]
    backwards = {i: there[i] for i in reversed(asked)}
    assert all(torch.equal(here[i], backwards[i]) for i in asked)


def test_the_seed_and_the_counter_choose_the_crop():
    config = DataConfig(image_size=CROP)
    a, b = load(config, seed=0).train, load(config, seed=1).train
    assert not torch.equal(a[0], b[0])
    assert not torch.equal(a[0], a[1])


def test_photographs_never_reach_for_the_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket, "socket", refuse)
    data = load(DataConfig(image_size=CROP), seed=0)
    assert len(data.held_out) == 48
    items = torch.stack([data.train[i] for i in range(8)] + [data.held_out[i] for i in range(48)])
    assert items.shape == (56, 3, CROP, CROP)
    assert items.dtype == torch.float32
    assert items.min() >= -1 and items.max() <= 1
    assert items.std() > 0.3


def test_digits_are_split_and_scaled():
    data = load(DataConfig("digits", image_size=32), seed=0)
    assert (len(data.train), len(data.held_out)) == (1437, 360)
    assert data.train[0].shape == (1, 32, 32)
    assert data.train.images.min() == -1 and data.train.images.max() == 1


def test_folder_trains_on_nine_tenths_and_enlarges_small_pictures(tmp_path):
    for i in range(20):
        (tmp_path / "below").mkdir(exist_ok=True)
        Image.new("RGB", (9, 7), (i, 0, 0)).save(tmp_path / "below" / f"{i:02d}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    for name in ("paper.pdf", "film.mpg", "data.h5"):  # whose names Pillow knows
        (tmp_path / name).write_bytes(b"not an image either")
    data = load(DataConfig("folder", path=str(tmp_path), image_size=CROP), seed=0)

    def reds(items) -> set[int]:
        return set().union(*(columns_of(item) for item in items))

    assert reds(data.held_out) == {0, 10}
    assert reds(data.train[i] for i in range(300)) == set(range(20)) - {0, 10}
    assert data.train[0].shape == (3, CROP, CROP)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing", "--path must be a folder of images, got .*missing"),
        (lambda d: d, "--path must hold at least 2 images .*with 0"),
    ],
)
def test_a_folder_that_cannot_serve_is_named(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(DataConfig("folder", path=str(make(tmp_path)), image_size=CROP), seed=0)


def test_a_broken_image_is_named(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png is not an image"):
        load(DataConfig("folder", path=str(tmp_path), image_size=CROP), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "imagenet"}, "--dataset must be one of photographs, unseen-photographs, digits, folder, got 'imagenet'"),
        ({"dataset": "folder"}, "--dataset folder needs --path DIR"),
        ({"dataset": "digits", "path": "x"}, "--path is read by --dataset folder only"),
        ({"image_size": 0}, "--image-size must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 30), st.integers(0, 2**63 - 1))
def test_a_resumed_sampler_goes_on_where_the_whole_one_would_be(num_items, batch_size, start, seed):
    whole = list(StepSampler(num_items, batch_size, seed=seed, stop=40))
    assert list(StepSampler(num_items, batch_size, seed=seed, start=start, stop=40)) == whole[start:]
    flat = [item for batch in whole for item in batch]
    for epoch in range(len(flat) // num_items):
        assert sorted(flat[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


def test_each_epoch_and_seed_has_its_own_order():
    first, second = (StepSampler(100, 100, seed=0, stop=2).batch(step) for step in range(2))
    assert first != second
    assert first != StepSampler(100, 100, seed=1, stop=2).batch(0)


@pytest.mark.parametrize(("num_items", "batch_size", "name"), [(0, 1, "num_items"), (1, 0, "batch_size")])
def test_an_empty_sampler_is_refused(num_items, batch_size, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        StepSampler(num_items, batch_size, seed=0, stop=1)
