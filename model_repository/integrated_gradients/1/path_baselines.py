"""Where an integration path starts: the baselines a request can name, as normalised pixels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur

# The blur keeps the scene's colours and removes its shapes: at 224 pixels, sigma 10 hides anything under 20 pixels.
# Images of other sizes are blurred by the same share of their shorter side.
BLUR_SHARE = 10 / 224
# The kernel reaches so many sigmas to each side.
BLUR_REACH = 3
# Smaller changes of normalised pixels are rounding: one of 255 levels is about 0.017.
ROUNDING = 1e-5

# `tools.calibrate --baseline-images` writes it beside the network.
IMAGES_FILE = "baseline_images.npz"
MOST_IMAGES = 8

_PIXEL_VALUES = {"black": 0.0, "gray": 0.5, "white": 1.0}


class BaselineError(Exception):
    """There are no baseline images of this network; the message says why."""


def load_images(file: Path, model_sha256: str, shape: Sequence[int]) -> torch.Tensor:
    """The baseline images of a network, float32 [n, channels, height, width], normalised.

    Args:
        file: of `tools/calibrate`.
        model_sha256: of the network's file.
        shape: of its input, [channels, height, width].

    Raises:
        BaselineError: the file is missing, not valid, or another network's.
    """
    hint = "python -m tools.calibrate --baseline-images FOLDER writes it"
    try:
        with np.load(file, allow_pickle=False) as content:
            owner, pixels = str(content["model_sha256"]), content["pixels"]
    except FileNotFoundError:
        raise BaselineError(f"this network has no {file.name}; {hint}") from None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise BaselineError(f"{file.name} cannot be read ({error!r:.100}); {hint}") from None
    if owner != model_sha256:
        raise BaselineError(f"{file.name} belongs to another network (sha256 {owner:.12}...); {hint}")
    is_valid = pixels.dtype == np.float32 and pixels.ndim == 4 and pixels.shape[1:] == tuple(shape)
    is_valid = is_valid and 1 <= len(pixels) <= MOST_IMAGES
    if not (is_valid and np.isfinite(pixels).all()):
        raise BaselineError(f"{file.name} has no 1 to {MOST_IMAGES} images of {tuple(shape)}; {hint}")
    return torch.from_numpy(pixels)


def blur(pixels: torch.Tensor) -> torch.Tensor:
    """An image [channels, height, width], Gaussian-blurred by ``BLUR_SHARE`` of its shorter side.

    An image of one colour is its own blur, without the rounding that would be all there is to explain.
    """
    sigma = BLUR_SHARE * min(pixels.shape[-2:])
    kernel_size = 2 * round(BLUR_REACH * sigma) + 1
    blurred = gaussian_blur(pixels, [kernel_size] * 2, [sigma] * 2)
    return torch.where((blurred - pixels).abs().max() > ROUNDING, blurred, pixels)


class Baselines:
    """Makes baselines for images normalised with ``mean`` and ``std``, one value for each channel.

    ``images``, float32 [n, channels, height, width], are the baselines of ``images``.
    """

    CONSTANT = ("zero", *_PIXEL_VALUES)

    def __init__(self, mean: Sequence[float], std: Sequence[float], images: Sequence[torch.Tensor] = ()) -> None:
        self.images = images
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def count(self, names: Sequence[str]) -> int:
        """How many baselines some names stand for."""
        return sum(len(self.images) if name == "images" else 1 for name in names)

    def starts(self, names: Sequence[str], pixels: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, Hashable]]:
        """The baselines that some names stand for, each with a key; equal keys promise equal baselines.

        Arguments are those of ``make``. Its names may have ``images`` among them. The key is None if the baseline
        depends on ``pixels`` or ``seed``.
        """
        for name in names:
            if name == "images":
                yield from ((image, (name, number)) for number, image in enumerate(self.images))
            else:
                yield self.make(name, pixels, seed), name if name in self.CONSTANT else None

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
