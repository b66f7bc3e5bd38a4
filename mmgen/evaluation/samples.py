"""How good samples of a class-conditional model are, without a network that would have to be downloaded.

Fidelity: a classifier, trained on data that the model never saw, finds the label that was asked for. Coverage: the Frechet distance
of pixels. Originality: samples are not nearer to training images than real images that were held out are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import mmgen_kernels as mk
from mmgen.data import LabelledData


@dataclass(frozen=True)
class SampleScores:
    """Of samples; and of the held-out images, as far as that makes sense, to read them by."""

    agreement: float  # share of samples in which a classifier sees the label that was asked for
    frechet_distance: float  # of pixels, to the training images
    nearest_distance: float  # median distance to the nearest training image
    held_out_agreement: float  # of the same classifier with the training images, which it has not seen
    held_out_frechet_distance: float
    held_out_nearest_distance: float

    @property
    def originality(self) -> float:
        """Distance to the nearest training image, in that of held-out images."""
        return self.nearest_distance / self.held_out_nearest_distance


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, means and covariances of two sets of images, (N, ...) and (M, ...).

    Of the numbers as they are, pixels in [-1, 1], say. fp64.

    Source: Dowson and Landau 1982; Heusel et al. 2017 (of a network's features).
    """
    a, b = a.double().flatten(1), b.double().flatten(1)  # (N, P), (M, P)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b must have images of a's {a.shape[1]} numbers, got {b.shape[1]}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a and b must have 2 images or more, got {len(a)} and {len(b)}")
    of_a, of_b = a.T.cov(), b.T.cov()  # (P, P)
    # The product is similar to a positive semi-definite matrix: its eigenvalues are real and not negative, but for rounding.
    roots = torch.linalg.eigvals(of_a @ of_b).real.clamp(min=0).sqrt()
    distance = (a.mean(0) - b.mean(0)).square().sum() + of_a.trace() + of_b.trace() - 2 * roots.sum()
    return distance.item()


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of each image to the nearest of `others`, (N,)."""
    rows, codebook = images.flatten(1), others.flatten(1)  # (N, P), (M, P)
    return (rows - codebook[mk.nearest_code(rows, codebook)]).norm(dim=1)


class Classifier:
    """A support vector machine on pixels, shown each image also moved by a pixel in each direction."""

    def __init__(self, images: Tensor, labels: Tensor):
        from sklearn.svm import SVC

        shifts = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
        moved = torch.cat([shifted(images, *shift) for shift in shifts])  # (5 N, C, H, W)
        self.machine = SVC(C=10.0, gamma="scale").fit(moved.flatten(1).numpy(), labels.repeat(len(shifts)).numpy())

    def __call__(self, images: Tensor) -> Tensor:
        """Labels of images (N, C, H, W), (N,)."""
        return torch.from_numpy(np.asarray(self.machine.predict(images.flatten(1).numpy())))


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """What moves in is background, -1."""
    rolled = images.roll((down, right), dims=(2, 3)).clone()
    for dim, by in ((2, down), (3, right)):
        if by:
            rolled.narrow(dim, 0 if by > 0 else images.shape[dim] + by, abs(by)).fill_(-1)
    return rolled


def evaluate_samples(samples: Tensor, labels: Tensor, data: LabelledData) -> SampleScores:
    """Scores of samples (N, C, H, W) in [-1, 1] that were asked for by labels (N,)."""
    trained_on, trained_labels = data.train.tensors()
    held_out, held_out_labels = data.held_out.tensors()
    classifier = Classifier(held_out, held_out_labels)

    def share(images: Tensor, wanted: Tensor) -> float:
        return (classifier(images) == wanted).double().mean().item()

    return SampleScores(
        agreement=share(samples, labels),
        frechet_distance=frechet_distance(samples, trained_on),
        nearest_distance=nearest_distances(samples, trained_on).median().item(),
        held_out_agreement=share(trained_on, trained_labels),
        held_out_frechet_distance=frechet_distance(held_out, trained_on),
        held_out_nearest_distance=nearest_distances(held_out, trained_on).median().item(),
    )
