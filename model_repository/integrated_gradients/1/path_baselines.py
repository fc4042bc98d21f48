"""Where an integration path starts: the baselines a request can name, as normalised pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms.functional import gaussian_blur

# The blur keeps the scene's colours and removes its shapes: at 224 pixels, sigma 10 hides anything under 20 pixels.
# Images of other sizes are blurred by the same share of their shorter side.
BLUR_SHARE = 10 / 224
# The kernel reaches so many sigmas to each side.
BLUR_REACH = 3
# Smaller changes of normalised pixels are rounding: one of 255 levels is about 0.017.
ROUNDING = 1e-5

_PIXEL_VALUES = {"black": 0.0, "gray": 0.5, "white": 1.0}


def blur(pixels: torch.Tensor) -> torch.Tensor:
    """An image [channels, height, width], Gaussian-blurred by ``BLUR_SHARE`` of its shorter side.

    An image of one colour is its own blur, without the rounding that would be all there is to explain.
    """
    sigma = BLUR_SHARE * min(pixels.shape[-2:])
    kernel_size = 2 * round(BLUR_REACH * sigma) + 1
    blurred = gaussian_blur(pixels, [kernel_size] * 2, [sigma] * 2)
    return torch.where((blurred - pixels).abs().max() > ROUNDING, blurred, pixels)


class Baselines:
    """Makes baselines for images normalised with ``mean`` and ``std``, one value for each channel."""

    CONSTANT = ("zero", *_PIXEL_VALUES)

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
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
            float32, shaped like ``pixels``. Baselines in ``CONSTANT`` depend only on that shape, and are views of one
            colour, since up to six belong to each waiting image.
        """
        if name == "zero":
            return pixels.new_zeros(()).expand_as(pixels)
        if name == "blur":
            return blur(pixels)
        if name == "noise":
            return torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return ((_PIXEL_VALUES[name] - mean) / std).expand_as(pixels)
