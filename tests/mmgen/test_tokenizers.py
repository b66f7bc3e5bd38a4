"""`python -m mmgen train vqgan`, `train vae` and `tokenizers`, and the measures they are told apart by."""

import base64
import io
import json
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmgen.cli import main
from mmgen.data import load
from mmgen.evaluation import detail, evaluate, frechet_distance
from mmgen.evaluation.features import patch_features
from mmgen.models import VQVAE
from mmgen.presets import photographs
from mmgen.tasks.tokenizers import markdown, table
from mmgen.training import checkpoint, log

SMALL = "--steps 4 --batch-size 2 --image-size 32 --disc-start 2 --disc-warmup 1 --threads 1 --device cpu"
NAMES = ["VQ-VAE", "VQGAN, no discriminator", "VQGAN", "KL autoencoder"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("tokenizers")
    main(["tokenizers", *SMALL.split(), "--seeds", "0", "3", "--out", str(out)])
    return out


def test_the_four_see_the_same(finished):
    folders = sorted(path.name for path in finished.iterdir() if path.is_dir())
    names = ("vq-vae", "vqgan-no-discriminator", "vqgan", "kl-autoencoder")
    assert folders == sorted(f"{name}-{seed}" for name in names for seed in (0, 3))
    saved = {name: checkpoint.read_config(checkpoint.latest(finished / name / "checkpoints")) for name in folders}
    for name, config in saved.items():
        other = saved[f"vqgan-{name[-1]}"]
        assert config["data"] == other["data"]
        shared = config["model"].keys() & other["model"].keys()
        assert {"channels", "attention", "num_res_blocks"} <= shared
        assert all(config["model"][key] == other["model"][key] for key in shared)
        for key in ("steps", "batch_size", "learning_rate", "seed"):
            assert config["training"][key] == other["training"][key]
    for seed in (0, 3):  # until the discriminator is heard it is the same run
        with_it, without = (log.read(finished / f"{name}-{seed}" / "log.jsonl") for name in ("vqgan", "vqgan-no-discriminator"))
        same = [a["loss"] == b["loss"] for a, b in zip(with_it, without, strict=True)]
        assert same == [True, True, False, False]
        assert with_it[-1]["disc_loss"] > 0 and without[-1]["disc_loss"] == 0


def test_the_result_is_told_as_numbers_and_pictures(finished):
    result = json.loads((finished / "tokenizers.json").read_text())
    assert list(result["scores"]) == NAMES
    assert all(list(by_seed) == ["0", "3"] for by_seed in result["scores"].values())
    assert result["settings"]["training"]["steps"] == 4 and list(result["cpu_seconds_per_step"]) == NAMES
    assert Image.open(finished / "tokenizers.png").size == (2 * 12 * 33, 2 * 4 * 33)
    page = (finished / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size[0] for data in pictures] == [2 * 12 * 33, 1320]
    assert all(name in page for name in NAMES)


def test_run_again_it_trains_nothing_and_says_the_same(finished):
    before = json.loads((finished / "tokenizers.json").read_text())
    logged = (finished / "vqgan-3" / "log.jsonl").read_text()
    main(["tokenizers", *SMALL.split(), "--seeds", "0", "3", "--out", str(finished)])
    assert json.loads((finished / "tokenizers.json").read_text())["scores"] == before["scores"]
    assert (finished / "vqgan-3" / "log.jsonl").read_text() == logged


def test_the_table_has_means_and_ranges():
    value = {"detail": 0.5, "frechet_distance": 0.1, "psnr": 20.0, "usage": 0.75, "perplexity": 300.0}
    other = value | {"detail": 0.7, "psnr": 22.0}
    none = {"usage": None, "perplexity": None}
    scores = {"a": {"0": value, "1": other}, "b": {"0": value | none, "1": value | none}, "c": {"0": value}}
    result = {"scores": scores, "cpu_seconds_per_step": {"a": 0.0123, "b": 0.5, "c": 2}}
    rows = table(result)
    assert rows[1][:3] == ("a", "0.600 (0.500 to 0.700)", "0.100 (0.100 to 0.100)")
    assert rows[1][3:] == ("21.00 (20.00 to 22.00)", "75% (75% to 75%)", "300 (300 to 300)", "0.012")
    assert rows[2][-3:-1] == ("none", "none")
    assert rows[3][1:] == ("0.500", "0.100", "20.00", "75%", "300", "2.000")
    assert markdown(result).splitlines()[-1] == "| c | 0.500 | 0.100 | 20.00 | 75% | 300 | 2.000 |"


@pytest.mark.parametrize(("kind", "part"), [("vqgan", "codebook_size"), ("vae", "latent_channels")])
def test_one_is_trained_and_its_reconstructions_are_shown(tmp_path, capsys, kind, part):
    main(["train", kind, *SMALL.split(), "--no-attention", f"--{part.replace('_', '-')}", "24", "--out", str(tmp_path)])
    last = checkpoint.latest(tmp_path / "checkpoints")
    saved = checkpoint.read_config(last)
    assert (last.name, saved["model"][part], saved["model"]["attention"]) == ("step-00000004", 24, False)
    assert (saved["training"]["disc_start"], saved["training"]["disc_warmup"]) == (2, 1)
    assert Image.open(tmp_path / "reconstructions.png").size == (2 * 12 * 33, 2 * 2 * 33)
    assert "reconstructions.png" in capsys.readouterr().out
    assert set(checkpoint.read_state(last)) >= {"discriminator", "disc_optimizer"}


def test_the_tokenizer_of_a_vqgan_is_a_vq_vae(finished):
    last = checkpoint.latest(finished / "vqgan-0" / "checkpoints")
    config = checkpoint.read_config(last)["model"]
    kind = type(photographs().model)
    VQVAE(kind(**config | {"channels": tuple(config["channels"])})).load_state_dict(checkpoint.read_weights(last))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train vae --codebook-size 8", "error: --codebook-size is no option of this model"),
        ("train vqgan --kl-weight 1", "error: --kl-weight is no option of this model"),
        ("train --disc-start 1", "error: --disc-start is no option of this model"),
        ("train vqgan --steps 10", "error: --disc-start must be below --steps, 10"),
        ("train vqgan --image-size 8", "error: --image-size must be at least 12, of which a discriminator has one patch"),
        ("train vae --image-size 36", "error: --image-size must be divisible by 8, the pixels per token, got 36"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments.split(), "--out", str(tmp_path)])
    assert str(stopped.value).startswith(message)


# -- measures


def wave(cycles_per_pixel: float, across: int = 3, size: int = 64) -> torch.Tensor:
    """A wave along the last dimension `across`, (1, 1, size, size)."""
    wave = torch.cos(2 * torch.pi * cycles_per_pixel * torch.arange(size)).expand(1, 1, size, size)
    return wave if across == 3 else wave.mT


def test_detail_is_the_energy_of_short_waves():
    for across in (2, 3):
        assert detail(wave(1 / 3, across)).item() == pytest.approx(64 * 64 * 0.5 * (3 / 8) ** 2, rel=1e-3)  # by a Hann window each
        assert detail(wave(1 / 8, across)).item() < 1e-6
    diagonal = torch.cos(2 * torch.pi * (torch.arange(64)[:, None] + torch.arange(64)) * 0.2)[None, None]
    assert detail(diagonal).item() == pytest.approx(64 * 64 * 0.5 * (3 / 8) ** 2, rel=1e-3)  # 0.28 cycles along the diagonal
    assert detail(torch.full((2, 3, 16, 16), 0.7)).abs().max() < 1e-9
    both = torch.cat([wave(1 / 3), 2 * wave(1 / 3)])
    torch.testing.assert_close(detail(both)[1], 4 * detail(both)[0])


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    held_out = load(photographs().data, seed=0).held_out
    return torch.stack([held_out[i] for i in range(0, 48, 2)])  # (24, 3, 64, 64)


def blurred(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")


def test_blur_takes_detail_away(crops):
    class Blur(VQVAE):
        def forward(self, image):
            out = super().forward(image)
            return out._replace(image=blurred(image))

    config = photographs().model
    model = Blur(type(config)(channels=(8,), codebook_size=4))
    scores = evaluate(model, list(crops), batch_size=5, device=torch.device("cpu"))
    assert scores["detail"] == pytest.approx((detail(blurred(crops)).sum() / detail(crops).sum()).item(), rel=1e-4)
    assert scores["detail"] < 0.2


def test_the_features_tell_blur_and_noise_from_photographs(crops):
    features = patch_features(crops)
    assert features.shape == (24 * 12 * 12, 64)
    torch.testing.assert_close(patch_features(crops[3:4]), features[3 * 144 : 4 * 144], atol=1e-4, rtol=1e-4)
    halves = frechet_distance(patch_features(crops.flip(-1)), features)  # the same textures, mirrored
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(0))
    noisy = frechet_distance(patch_features(crops + 0.1 * noise), features)
    blur = frechet_distance(patch_features(blurred(crops)), features)
    more = frechet_distance(patch_features(blurred(blurred(crops))), features)
    assert halves < blur < more
    assert halves < noisy
