"""Encoded images to the classifier's input, with Pillow and torchvision's own functions.

``load_pixels`` equals, on the decoded image,

    Compose([Resize(256), CenterCrop(224), ToTensor(), Normalize(mean, std)])

Files come from strangers: what they would cost is read from their size and their header and refused before it is spent.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional

RESIZED_SIDE = 256
CROPPED_SIDE = 224
FORMATS = ("JPEG", "PNG", "WEBP")
# A progressive JPEG goes over all its pixels once a scan. Encoders make some ten scans; 200 of 75 bytes each took 9 s
# on 49 million pixels (2 cores), and a file could hold any number.
MOST_JPEG_SCANS = 50
# Any marker but those that stand inside a scan: stuffed bytes and restarts.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_WITHOUT_LENGTH = (0x01, 0xD8)
_JPEG_START_OF_SCAN, _JPEG_END = 0xDA, 0xD9


class ImageError(ValueError):
    """The bytes are not an image that can be served; the message says why."""


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost; settings of the model.

    ``max_bytes`` of the file; ``max_pixels`` of the image, and of what it is resized to, whose long side grows with the
    ratio of its sides.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 50_000_000


def load_pixels(encoded: bytes, mean: list[float], std: list[float], limits: ImageLimits) -> torch.Tensor:
    """Decode, orient, resize, crop and normalise one image.

    Args:
        encoded: a JPEG, PNG or WebP file.
        mean, std: per channel, for pixel values in [0, 1].
        limits: what it may cost.

    Returns:
        float32 [3, 224, 224].

    Raises:
        ImageError: the bytes do not decode to an image, or to one beyond the limits.
    """
    image = decode_rgb(encoded, limits)
    image = functional.resize(image, RESIZED_SIDE)
    image = functional.center_crop(image, CROPPED_SIDE)
    return functional.normalize(functional.to_tensor(image), mean, std, inplace=True)


def decode_rgb(encoded: bytes, limits: ImageLimits) -> Image.Image:
    """Decode a file to an RGB image, upright by its EXIF orientation.

    Grey, CMYK and palette images are converted and alpha is dropped as ``Image.convert("RGB")`` does, which is what
    torchvision's dataset loaders use; colour profiles are ignored, as there. 16-bit images keep their high byte, as
    torchvision's ``to_dtype`` does. Of several frames the first counts.

    Raises:
        ImageError: the bytes do not decode to an image, or to one beyond the limits.
    """
    if not encoded:
        raise ImageError("IMAGE is empty")
    if len(encoded) > limits.max_bytes:
        raise ImageError(f"IMAGE has {len(encoded)} bytes; at most {limits.max_bytes} are allowed")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_cost(image, encoded, limits)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).clip(max=255).astype(np.uint8))
        return image.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, while it opens the file
        raise ImageError(f"IMAGE has too many pixels; at most {limits.max_pixels} in all are allowed") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"IMAGE is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:  # Pillow's readers raise whatever their parsers stumble over
        raise ImageError(f"IMAGE cannot be decoded: {str(error) or type(error).__name__:.200}") from None


def _check_cost(image: Image.Image, encoded: bytes, limits: ImageLimits) -> None:
    """Hold what an opened but not yet decoded image is going to cost against the limits.

    Raises:
        ImageError: it is too much.
    """
    width, height = image.size
    size = f"{width} x {height} pixels"
    if min(width, height) < 1:
        raise ImageError(f"IMAGE has {size}")
    if width * height > limits.max_pixels:
        raise ImageError(f"IMAGE has {size}; at most {limits.max_pixels} in all are allowed")
    if RESIZED_SIDE * RESIZED_SIDE * max(width, height) > limits.max_pixels * min(width, height):
        ratio = limits.max_pixels // RESIZED_SIDE**2
        raise ImageError(f"IMAGE has {size}; its long side must be at most {ratio} times its short side")
    if image.format in ("JPEG", "MPO") and _jpeg_scans(encoded) > MOST_JPEG_SCANS:
        raise ImageError(f"IMAGE is a JPEG file of over {MOST_JPEG_SCANS} scans")


def _jpeg_scans(encoded: bytes) -> int:
    """The number of scans of a JPEG file's first image; when there are too many, it may stop counting."""
    scans, position = 0, 2
    while scans <= MOST_JPEG_SCANS and (marker := _JPEG_MARKER.search(encoded, position)):
        code, position = marker[0][1], marker.end()
        if code == _JPEG_END:
            break
        scans += code == _JPEG_START_OF_SCAN
        if code not in _JPEG_WITHOUT_LENGTH:
            position += int.from_bytes(encoded[position : position + 2], "big")
    return scans
