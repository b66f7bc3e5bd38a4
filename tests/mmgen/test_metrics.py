import math

import pytest
import torch

from mmgen.evaluation import code_counts, evaluate, perplexity, psnr, reconstruct, usage
from mmgen.models import VQVAE, VQVAEConfig


def test_psnr_of_a_known_error():
    image = torch.zeros(2, 3, 4, 4)
    off = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])  # of a range of 2: 20 dB and 40 dB
    torch.testing.assert_close(psnr(off, image), torch.tensor([20.0, 40.0]))
    assert psnr(image, image).tolist() == [math.inf, math.inf]


def test_counts_are_those_of_bincount():
    indices = torch.randint(0, 50, (3, 7, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(code_counts(indices, 60), torch.bincount(indices.flatten(), minlength=60))


@pytest.mark.parametrize(
    ("counts", "share", "codes"), [([3, 3, 3, 3], 1.0, 4.0), ([12, 0, 0, 0], 0.25, 1.0), ([1, 1, 0, 0], 0.5, 2.0)]
)
def test_usage_and_perplexity_of_known_counts(counts, share, codes):
    assert usage(torch.tensor(counts)).item() == share
    assert perplexity(torch.tensor(counts)).item() == pytest.approx(codes)


def test_evaluation_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(channels=(8,), codebook_size=16))
    images = [torch.rand(3, 8, 8) * 2 - 1 for _ in range(5)]
    whole, in_parts = (evaluate(model, images, batch_size=n, device=torch.device("cpu")) for n in (5, 2))
    assert whole == pytest.approx(in_parts)
    assert whole["tokens"] == 5 * 16
    by_hand = torch.stack([psnr(reconstruct(model, image)[None], image[None]) for image in images]).mean()
    assert whole["psnr"] == pytest.approx(by_hand.item())


def test_reconstruct_takes_any_size_and_crops_to_whole_tokens():
    model = VQVAE(VQVAEConfig(channels=(8, 8), codebook_size=16))
    picture = reconstruct(model, torch.rand(3, 14, 23) * 2 - 1)
    assert picture.shape == (3, 12, 20)
    assert picture.abs().max() <= 1
