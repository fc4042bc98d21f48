"""Encoded images to the classifier's input, with Pillow and torchvision's own functions.

``open_image`` and ``load_pixels`` together equal, on the decoded image,

    Compose([Resize(resize, interpolation), CenterCrop(crop), ToTensor(), Normalize(mean, std)])

with the values of a ``Preprocessing``.

Files come from strangers: their cost is read from structure and header, and too much is refused before decoding.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from classifier_files import Preprocessing
from image_structure import ImageError, check_structure
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode, functional
from unended_jpeg import ended, lacks_pixels

FORMATS = ("JPEG", "PNG", "WEBP")
# The beginnings of their files.
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"RIFF": "WEBP"}
# The key in an image's ``info`` of the bytes of a file without an end marker.
UNENDED = "unended"
# Pillow's mode of an image, by the channels of the classifier's input.
MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageLimits:
    """The largest images and requests; settings of the model.

    ``max_bytes`` of a file; ``max_pixels`` of an image, before and after it is resized (the resized long side grows
    with the ratio of the sides); ``max_request_pixels`` of all images of a request.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_request_pixels: int = 100_000_000


def open_image(encoded: bytes, preprocessing: Preprocessing, limits: ImageLimits) -> Image.Image:
    """Open a JPEG, PNG or WebP file without decoding its pixels.

    Args:
        encoded: the file.
        preprocessing: what ``load_pixels`` will do to it; its resizing must keep within the limits.
        limits: of the server.

    Raises:
        ImageError: the bytes are not such a file, or it is beyond the limits.
    """
    if not encoded:
        raise ImageError("IMAGE is empty")
    if len(encoded) > limits.max_bytes:
        raise ImageError(f"IMAGE has {len(encoded)} bytes; at most {limits.max_bytes} are allowed")
    is_unended = check_structure(encoded)
    with _refusing(limits):
        try:
            image = Image.open(io.BytesIO(ended(encoded) if is_unended else encoded), formats=FORMATS)
        except UnidentifiedImageError:
            raise ImageError(_unidentified(encoded)) from None
    if is_unended:
        image.info[UNENDED] = encoded
    width, height = image.size
    size = f"{width} x {height} pixels"
    if min(width, height) < 1:
        raise ImageError(f"IMAGE has {size}")
    if width * height > limits.max_pixels:
        raise ImageError(f"IMAGE has {size}; at most {limits.max_pixels} in all are allowed")
    square = _resized_square(preprocessing)
    if square * max(width, height) > limits.max_pixels * min(width, height):
        ratio = limits.max_pixels // square
        raise ImageError(f"IMAGE has {size}; its long side must be at most {ratio} times its short side")
    return image


def _unidentified(encoded: bytes) -> str:
    """Why Pillow cannot tell what a file is."""
    for signature, kind in SIGNATURES.items():
        if encoded.startswith(signature) and (kind != "WEBP" or encoded[8:12] == b"WEBP"):
            return f"IMAGE cannot be decoded: the header of the {kind} file is broken"
    return f"IMAGE is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"


def _resized_square(preprocessing: Preprocessing) -> int:
    """Pixels of a resized square image; others have them times the ratio of their sides. 0 if the size is exact.

    Where a side of the crop is longer than that of the square, the border that the crop may add counts, too.
    """
    side = preprocessing.resize
    return side * max(side, *preprocessing.crop) if isinstance(side, int) else 0


def load_pixels(image: Image.Image, preprocessing: Preprocessing, limits: ImageLimits) -> torch.Tensor:
    """Decode, orient, resize, crop and normalise one image.

    Args:
        image: returned by ``open_image``; decoded in place.
        preprocessing: of the classifier.
        limits: named in messages.

    Returns:
        float32 [channels, height, width].

    Raises:
        ImageError: the file is broken.
    """
    return to_pixels(decode_image(image, MODES[preprocessing.channels], limits), preprocessing)


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize, crop and normalise a decoded image of the right mode of ``MODES``; float32 [channels, height, width]."""
    size = preprocessing.resize if isinstance(preprocessing.resize, int) else list(preprocessing.resize)
    image = functional.resize(image, size, InterpolationMode(preprocessing.interpolation))
    image = functional.center_crop(image, list(preprocessing.crop))
    return functional.normalize(functional.to_tensor(image), preprocessing.mean, preprocessing.std, inplace=True)


def decode_image(image: Image.Image, mode: str, limits: ImageLimits) -> Image.Image:
    """Decode an opened image to a mode of ``MODES``, upright by its EXIF orientation.

    Other modes are converted and alpha is dropped as ``Image.convert`` does, which is what torchvision's dataset
    loaders use; colour profiles are ignored, as there. 16-bit images keep their high byte, as torchvision's
    ``to_dtype`` does. Only the first frame is used.

    Raises:
        ImageError: the file is broken.
    """
    with _refusing(limits):
        if UNENDED in image.info and lacks_pixels(image.info.pop(UNENDED), image):
            raise ImageError("IMAGE cannot be decoded: the end of the JPEG file is missing")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).clip(max=255).astype(np.uint8))
        return image if image.mode == mode else image.convert(mode)


@contextmanager
def _refusing(limits: ImageLimits) -> Iterator[None]:
    """Turn whatever Pillow raises into an ``ImageError``."""
    try:
        yield
    except (MemoryError, ImageError):
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, while it opens the file
        raise ImageError(f"IMAGE has too many pixels; at most {limits.max_pixels} in all are allowed") from None
    except Exception as error:  # Pillow's readers raise whatever their parsers stumble over
        raise ImageError(f"IMAGE cannot be decoded: {str(error) or type(error).__name__:.200}") from None
