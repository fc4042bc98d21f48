"""Deletion and insertion curves, which show whether a saliency map finds what the network uses (arXiv 1806.07421)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from path_baselines import blur
from torch import Tensor

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
    """Delete the most salient pixels from an image, and insert them into a blurred one.

    A deleted pixel is replaced by that of the blurred image, with which insertion curves begin.

    Args:
        network: images [n, channels, height, width] -> logits [n, classes].
        image: float32 [channels, height, width].
        saliency: [height, width].
        target: class whose probability the curves show.
    """
    blurred = blur(image)
    ranks = torch.empty(saliency.numel(), dtype=torch.long, device=image.device)
    ranks[saliency.flatten().argsort(descending=True)] = torch.arange(saliency.numel(), device=image.device)
    counts = torch.linspace(0, saliency.numel(), POINTS, device=image.device)
    is_salient = ranks.view(1, 1, *saliency.shape) < counts.view(-1, 1, 1, 1)

    def probabilities(images: Tensor) -> Tensor:
        return torch.cat([network(batch).softmax(dim=1)[:, target] for batch in images.split(16)])

    return Curves(
        probabilities(torch.where(is_salient, blurred, image)),
        probabilities(torch.where(is_salient, image, blurred)),
    )
