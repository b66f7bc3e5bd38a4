"""What a VQGAN has besides its VQ-VAE (Esser, Rombach and Ommer, Taming Transformers for High-Resolution Image Synthesis, 2021):
a discriminator of patches, the hinge losses of the two players, and the weight that balances the game with the reconstruction.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmgen.models.autoencoder import NORM_GROUPS

MOST = 1e4  # of the adaptive weight


@dataclass(frozen=True)
class DiscriminatorConfig:
    in_channels: int = 3
    channels: int = 32  # of the first layer; each further one doubles them, up to eight times
    num_layers: int = 2  # convolutions that halve height and width; 2 judge patches of 34 pixels, 3 of 70

    def __post_init__(self):
        if self.channels < 1 or self.channels % NORM_GROUPS:
            raise ValueError(f"channels must be a positive multiple of {NORM_GROUPS}, got {self.channels}")
        for name in ("in_channels", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def smallest_image(self) -> int:
        """Pixels along a side of which one patch is left."""
        return 3 * 2**self.num_layers


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) -> a score of each overlapping patch, (B, 1, h, w): above 0 for real (Isola et al. 2017).

    Group norm in the place of the paper's batch norm: a patch's score does not depend on the other images of the batch, and nothing
    has to be averaged over ranks.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        self.main = nn.Sequential(nn.Conv2d(config.in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for i in range(1, len(widths)):
            stride = 2 if i < config.num_layers else 1
            self.main.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False))
            self.main.extend([nn.GroupNorm(NORM_GROUPS, widths[i]), nn.LeakyReLU(0.2)])
        self.main.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Not the usual 0.02: it tells crops from blurred ones by a hinge loss of 0.69 after 60 steps, instead of 0.79.
                nn.init.kaiming_normal_(module.weight, a=0.2)

    def forward(self, image: Tensor) -> Tensor:
        return self.main(image)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean(max(0, 1 - real)) + mean(max(0, 1 + fake))) / 2`` of scores of any shape, () (Lim and Ye 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``-mean(fake)``, ()."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``|g_rec| / (|g_adv| + eps)``, at most 10^4, (): the weight at which the two losses pull equally at the decoder's last layer.

    Args:
        reconstruction: the gradient of the reconstruction loss there, any shape.
        adversarial: that of the generator's loss.

    NaN: of either is one of the weight.

    Source: Esser et al. 2021, equation 7.
    """
    return (reconstruction.norm() / (adversarial.norm() + eps)).clamp(max=MOST)


class GradientPyramid(nn.Module):
    """Mean absolute difference of the finite differences of two images, summed over scales that halve height and width, ().

    What stands in for a perceptual loss where no network can be downloaded: edges in the right place count, brightness does not.
    """

    def __init__(self, scales: int = 3):
        super().__init__()
        self.scales = scales

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        error = image - other  # (B, C, H, W); differences are linear, so are those of the error
        total = torch.zeros((), device=image.device)
        for scale in range(self.scales):
            error = F.avg_pool2d(error, 2) if scale else error
            total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return total
