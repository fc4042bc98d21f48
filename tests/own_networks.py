"""Networks of somebody's own, for ``--arch own_networks:FUNCTION``."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """A small convolutional classifier of images of any size."""

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(pixels)).relu().mean((2, 3)))
        return logits


class TwoOutputs(Tiny):
    """(logits, probabilities)"""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.head(self.norm(self.conv(pixels)).relu().mean((2, 3)))
        return logits, logits.softmax(1)


class Swapped(Tiny):
    """(probabilities, logits)"""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.head(self.norm(self.conv(pixels)).relu().mean((2, 3)))
        return logits.softmax(1), logits


class Gated(nn.Module):
    """Gates, attention, layer normalisation and GELU behind a convolution."""

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 16, 8, stride=8), nn.BatchNorm2d(16)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.mix = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        features = nn.functional.silu(self.norm(self.conv(pixels)))
        features = features * self.gate(features)
        logits: Tensor = self.head(self.mix(features.flatten(2).transpose(1, 2)).mean(1))
        return logits


class Grouped(Tiny):
    """Group normalisation, which has no discrete gradients here."""

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__(classes, channels)
        self.groups = nn.GroupNorm(2, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.groups(self.conv(pixels)).relu().mean((2, 3)))
        return logits


class Sequence(nn.Module):
    """Takes the images of a batch for the steps of a sequence."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(3 * 16 * 16, 8), nn.Linear(8, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        features, _ = self.memory(nn.functional.adaptive_avg_pool2d(pixels, 16).flatten(1))
        logits: Tensor = self.head(features)
        return logits


class Flat(nn.Module):
    """A perceptron for images of 32 x 32 pixels; its weights lie under ``model.``, and that is no wrapper's prefix."""

    def __init__(self, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.model = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                first=nn.Linear(channels * 32 * 32, 8),
                activation=nn.ReLU(),
                last=nn.Linear(8, classes),
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixels)
        return logits


class Noisy(Tiny):
    """Drops values in evaluation mode, too."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(pixels), training=True)


def tiny() -> nn.Module:
    return Tiny()


def noisy() -> nn.Module:
    return Noisy()


def flat() -> nn.Module:
    return Flat()


def sequence() -> nn.Module:
    return Sequence()


def four_channels() -> nn.Module:
    return Tiny(channels=4)


def features() -> nn.Module:
    return nn.Conv2d(3, 8, 3)


def failing() -> nn.Module:
    raise ValueError("no data folder")


def number() -> int:
    return 3


def seeded(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, with seeded random weights and statistics, so that no two layers are alike."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            values = 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return network.eval()
