import numpy as np
import pytest
import torch

from mmgen.data import labelled_digits
from mmgen.evaluation import evaluate_samples, frechet_distance
from mmgen.evaluation.samples import Classifier, nearest_distances, shifted


@pytest.fixture(scope="module")
def digits():
    return labelled_digits()


def normal(size: int, mean: float, std: float, seed: int) -> torch.Tensor:
    return torch.randn(size, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std + mean


def test_the_frechet_distance_of_gaussians_is_known():
    a, b = normal(200_000, 0.0, 1.0, 0), normal(200_000, 0.5, 2.0, 1)
    assert frechet_distance(a, b) == pytest.approx(4 * (0.5**2 + 1), rel=0.01)  # for each pixel (mean)^2 + (std - std)^2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_the_frechet_distance_sees_correlations():
    z = normal(50_000, 0.0, 1.0, 0)[:, :, :, :1].expand(-1, -1, -1, 2)  # two equal columns
    independent = torch.stack([z[..., 0], z[torch.randperm(len(z)), :, :, 0]], dim=-1)
    # of a pair: C_a = [[1, 1], [1, 1]], C_b = I: 2 + 2 - 2 sqrt(2)
    assert frechet_distance(z, independent) == pytest.approx(2 * (4 - 2 * 2**0.5), rel=0.02)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="b must have images of a's 4 numbers, got 8"):
        frechet_distance(torch.zeros(3, 4), torch.zeros(3, 8))
    with pytest.raises(ValueError, match="a and b must have 2 images or more, got 1 and 3"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))


def test_nearest_distances():
    others = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).view(2, 1, 1, 2)
    images = torch.tensor([[0.0, 1.0], [3.0, 2.0]]).view(2, 1, 1, 2)
    assert nearest_distances(images, others).tolist() == [1.0, 2.0]


def test_shifted_moves_background_in():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    assert shifted(image, 1, 0)[0, 0].tolist() == [[-1, -1, -1], [0, 1, 2], [3, 4, 5]]
    assert shifted(image, 0, -1)[0, 0].tolist() == [[1, 2, -1], [4, 5, -1], [7, 8, -1]]
    assert torch.equal(shifted(image, 0, 0), image)


def test_digits_of_one_part_are_not_in_the_other(digits):
    (train, labels), (held_out, _) = digits.train.tensors(), digits.held_out.tensors()
    assert (len(train), len(held_out)) == (1198, 599)
    assert train.shape[1:] == (1, 8, 8) and train.min() == -1 and train.max() == 1
    assert set(labels.tolist()) == set(range(10))
    assert nearest_distances(held_out, train).min() > 0
    from sklearn.datasets import load_digits

    source = load_digits()
    image, label = digits.held_out[1]
    assert np.array_equal((image[0].numpy() + 1) * 8, source.images[5]) and label == source.target[5]


def test_the_classifier_reads_digits_that_it_has_not_seen(digits):
    images, labels = digits.train.tensors()
    classifier = Classifier(*digits.held_out.tensors())
    assert (classifier(images) == labels).double().mean() > 0.98


def test_real_digits_score_well_copies_are_found_out_and_noise_is_noise(digits):
    held_out, labels = digits.held_out.tensors()
    train, train_labels = digits.train.tensors()
    real = evaluate_samples(held_out, labels, digits)
    assert real.originality == 1
    assert real.frechet_distance == real.held_out_frechet_distance < 0.4
    copies = evaluate_samples(train, train_labels, digits)
    assert copies.originality == 0 and copies.frechet_distance < 1e-6
    assert copies.agreement == copies.held_out_agreement > 0.98
    assert evaluate_samples(held_out, (labels + 1) % 10, digits).agreement < 0.02
    noise = evaluate_samples(torch.rand_like(held_out) * 2 - 1, labels, digits)
    assert noise.frechet_distance > 20 and noise.agreement < 0.3
