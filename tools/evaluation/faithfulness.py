"""Whether a saliency map finds what the network uses: deletion and insertion curves (RISE, arXiv 1806.07421)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

# What stands for a pixel that was taken away: the image blurred beyond recognition, as insertion curves begin with.
BLUR_SIGMA = 10.0
BLUR_KERNEL_SIZE = 61
POINTS = 29  # steps of 1/28 of the pixels, 1,792 of 224 x 224


@dataclass(frozen=True)
class Curves:
    """Probabilities [points] of the explained class as pixels are deleted or inserted, the most salient first."""

    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> float:
        """Mean probability along the curve: the lower, the better the map."""
        return torch.trapezoid(self.deletion).item() / (len(self.deletion) - 1)

    @property
    def insertion_area(self) -> float:
        """Mean probability along the curve: the higher, the better the map."""
        return torch.trapezoid(self.insertion).item() / (len(self.insertion) - 1)


@torch.no_grad()
def curves(network: Callable[[Tensor], Tensor], image: Tensor, saliency: Tensor, target: int) -> Curves:
    """Take the most salient pixels away, and put them into a blurred image.

    Args:
        network: images [n, 3, height, width] -> logits [n, classes].
        image: [3, height, width].
        saliency: [height, width].
        target: class whose probability is watched.
    """
    blurred = gaussian_blur(image, [BLUR_KERNEL_SIZE] * 2, [BLUR_SIGMA] * 2)
    ranks = torch.empty(saliency.numel(), dtype=torch.long, device=image.device)
    ranks[saliency.flatten().argsort(descending=True)] = torch.arange(saliency.numel(), device=image.device)
    counts = torch.linspace(0, saliency.numel(), POINTS, device=image.device)
    taken = ranks.view(1, 1, *saliency.shape) < counts.view(-1, 1, 1, 1)

    def probabilities(images: Tensor) -> Tensor:
        return torch.cat([network(some).softmax(dim=1)[:, target] for some in images.split(16)])

    return Curves(
        probabilities(torch.where(taken, blurred, image)),
        probabilities(torch.where(taken, image, blurred)),
    )
