"""The logits of a network, found and checked by running it."""

from __future__ import annotations

from typing import Any

import torch
from error_reasons import reason
from torch import Tensor, nn

from tools.classifiers.source import ExportError

# Differences between two runs for one image, relative to the largest logit; float32 rounding is below 1e-5.
TOLERANCE = 1e-3


class FirstOutput(nn.Module):
    """A network's first output. Can be scripted if the network is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False  # the module of an exported program refuses eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels float32 [n, channels, height, width] -> logits [n, classes]."""
        return self.network(pixels)[0]


@torch.no_grad()
def with_logits(module: nn.Module, input_shape: tuple[int, int, int], name: str) -> tuple[nn.Module, int]:
    """A module that gives logits alone, and its number of classes.

    Args:
        module: gives logits [n, classes], or a pair of them and their probabilities.
        input_shape: [channels, height, width].
        name: of the weights, for messages.

    Raises:
        ExportError: it fails on such pixels, or gives something else.
    """
    pixels = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    shape = " x ".join(map(str, input_shape))
    try:
        alone = [module(pixels[:1]), module(pixels[1:])]
    except Exception as error:  # a network may raise anything
        raise ExportError(
            f"{name} fails on an image of {shape} ({reason(error)}): give the --size that it takes, or one value of "
            "--mean and --std if it takes grey images"
        ) from None
    try:
        outputs = module(pixels)
    except Exception:
        raise ExportError(
            f"{name} takes one image of {shape} but not two: export it with a dynamic first dimension"
        ) from None
    if isinstance(outputs, (tuple, list)) and len(outputs) == 2 and _is_scores(outputs[0]) and _is_scores(outputs[1]):
        module, alone, (outputs, probabilities) = FirstOutput(module), [each[0] for each in alone], outputs
        if outputs.shape != probabilities.shape or not _near(probabilities, outputs.softmax(dim=1)):
            raise ExportError(
                f"{name} has two outputs of which the second is not the softmax of the first: save it with the outputs "
                "(logits, probabilities), or logits alone"
            )
    if not _is_scores(outputs):
        raise ExportError(f"{name} gives {_described(outputs)} for 2 images: a classifier gives logits [2, classes]")
    if outputs.shape[1] < 2:
        raise ExportError(
            f"{name} gives one value for an image: a classifier needs at least 2 classes, with a logit each"
        )
    if not outputs.isfinite().all():
        raise ExportError(
            f"{name} gives values that are not finite: its weights are damaged, or their training diverged"
        )
    if (outputs >= 0).all() and _near(outputs.sum(dim=1), torch.ones(2)):
        raise ExportError(
            f"{name} gives probabilities, which sum to 1: save it without its softmax, so that it gives logits"
        )
    if not _near(outputs, torch.cat(alone)):
        raise ExportError(
            f"{name} gives other logits for an image in a batch than for the image alone: save it after .eval(), "
            "without dropout, with the batch as its first dimension"
        )
    return module, outputs.shape[1]


def _is_scores(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and outputs.dim() == 2 and len(outputs) == 2 and outputs.is_floating_point()


def _near(values: Tensor, reference: Tensor) -> bool:
    return bool((values - reference).abs().max() <= TOLERANCE * reference.abs().max().clamp_min(1e-6))


def _described(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"a tensor {list(outputs.shape)}"
    return f"a {type(outputs).__name__}" + (f" of {len(outputs)}" if isinstance(outputs, (tuple, list)) else "")
