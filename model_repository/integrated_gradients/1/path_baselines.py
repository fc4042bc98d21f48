"""Where an integration path starts: the baselines a request can name, as normalised pixels."""

from __future__ import annotations

import torch
from torchvision.transforms.functional import gaussian_blur

# The blur keeps the scene's colours and removes its shapes: at 224 pixels, sigma 10 hides anything under 20 pixels.
BLUR_SIGMA = 10.0
BLUR_KERNEL_SIZE = 61

_PIXEL_VALUES = {"black": 0.0, "gray": 0.5, "white": 1.0}


class Baselines:
    """Makes baselines for images normalised with ``mean`` and ``std``, one value for each channel."""

    CONSTANT = ("zero", *_PIXEL_VALUES)

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def make(self, name: str, pixels: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """The baseline ``name`` for one image.

        Args:
            name: ``zero`` (zeros after normalisation: the mean colour); ``black``, ``gray``, ``white`` (0, 0.5 and 1
                before normalisation); ``blur`` (the image itself, Gaussian-blurred); ``noise`` (standard normal, after
                normalisation).
            pixels: normalised, float32 [channels, height, width].
            seed: of the noise, which is drawn on the CPU so that it is the same on every device.

        Returns:
            float32, shaped like ``pixels``. Baselines in ``CONSTANT`` depend only on that shape.
        """
        if name == "zero":
            return torch.zeros_like(pixels)
        if name == "blur":
            return gaussian_blur(pixels, [BLUR_KERNEL_SIZE] * 2, [BLUR_SIGMA] * 2)
        if name == "noise":
            return torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return ((_PIXEL_VALUES[name] - mean) / std).expand_as(pixels).contiguous()
