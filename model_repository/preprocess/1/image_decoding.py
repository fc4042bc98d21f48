"""Encoded images to the classifier's input, with Pillow and torchvision's own functions.

``open_image`` and ``load_pixels`` together equal, on the decoded image,

    Compose([Resize(256), CenterCrop(224), ToTensor(), Normalize(mean, std)])

Files come from strangers: their cost is read from structure and header, and too much is refused before decoding.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from image_structure import ImageError, check_structure
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import functional

RESIZED_SIDE = 256
CROPPED_SIDE = 224
FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class ImageLimits:
    """The largest images and requests; settings of the model.

    ``max_bytes`` of a file; ``max_pixels`` of an image, before and after it is resized (the resized long side grows
    with the ratio of the sides); ``max_request_pixels`` of all images of a request.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_request_pixels: int = 100_000_000


def open_image(encoded: bytes, limits: ImageLimits) -> Image.Image:
    """Open a JPEG, PNG or WebP file without decoding its pixels.

    Raises:
        ImageError: the bytes are not such a file, or it is beyond the limits.
    """
    if not encoded:
        raise ImageError("IMAGE is empty")
    if len(encoded) > limits.max_bytes:
        raise ImageError(f"IMAGE has {len(encoded)} bytes; at most {limits.max_bytes} are allowed")
    check_structure(encoded)
    with _refusing(limits):
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = image.size
    size = f"{width} x {height} pixels"
    if min(width, height) < 1:
        raise ImageError(f"IMAGE has {size}")
    if width * height > limits.max_pixels:
        raise ImageError(f"IMAGE has {size}; at most {limits.max_pixels} in all are allowed")
    if RESIZED_SIDE * RESIZED_SIDE * max(width, height) > limits.max_pixels * min(width, height):
        ratio = limits.max_pixels // RESIZED_SIDE**2
        raise ImageError(f"IMAGE has {size}; its long side must be at most {ratio} times its short side")
    return image


def load_pixels(image: Image.Image, mean: list[float], std: list[float], limits: ImageLimits) -> torch.Tensor:
    """Decode, orient, resize, crop and normalise one image.

    Args:
        image: returned by ``open_image``; decoded in place.
        mean, std: per channel, for pixel values in [0, 1].
        limits: named in messages.

    Returns:
        float32 [3, 224, 224].

    Raises:
        ImageError: the file is broken.
    """
    rgb = decode_rgb(image, limits)
    rgb = functional.resize(rgb, RESIZED_SIDE)
    rgb = functional.center_crop(rgb, CROPPED_SIDE)
    return functional.normalize(functional.to_tensor(rgb), mean, std, inplace=True)


def decode_rgb(image: Image.Image, limits: ImageLimits) -> Image.Image:
    """Decode an opened image to RGB, upright by its EXIF orientation.

    Grey, CMYK and palette images are converted and alpha is dropped as ``Image.convert("RGB")`` does, which is what
    torchvision's dataset loaders use; colour profiles are ignored, as there. 16-bit images keep their high byte, as
    torchvision's ``to_dtype`` does. Only the first frame is used.

    Raises:
        ImageError: the file is broken.
    """
    with _refusing(limits):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).clip(max=255).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _refusing(limits: ImageLimits) -> Iterator[None]:
    """Turn whatever Pillow raises into an ``ImageError``."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, while it opens the file
        raise ImageError(f"IMAGE has too many pixels; at most {limits.max_pixels} in all are allowed") from None
    except UnidentifiedImageError:
        raise ImageError(f"IMAGE is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:  # Pillow's readers raise whatever their parsers stumble over
        raise ImageError(f"IMAGE cannot be decoded: {str(error) or type(error).__name__:.200}") from None
