"""Converts a caller's image to the bytes of a file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]

PNG_MODES = ("1", "L", "LA", "I;16", "I;16B", "P", "RGB", "RGBA")
# As in the server's `preprocess`: the short side is resized, the centre cropped.
RESIZED_SIDE, CROPPED_SIDE = 256, 224


def encoded(image: ImageSource) -> bytes:
    """The bytes to send: a file's own, else a PNG file, in RGB if PNG lacks the image's mode.

    Args:
        image: a path, the bytes of a JPEG, PNG or WebP file, a PIL image, or a uint8 array [height, width, 3] or
            [height, width].

    Raises:
        OSError: the file cannot be read.
        TypeError: an array of another dtype or shape.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise TypeError(
                f"an image array must be uint8 [height, width, 3] or [height, width], not {image.dtype} "
                f"{list(image.shape)}"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        if image.mode not in PNG_MODES:
            image = image.convert("I;16" if image.mode == "I" else "RGB")
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()
    return Path(image).read_bytes()


def as_seen(file: bytes) -> Image.Image:
    """The classifier's view of an image file, RGB 224 x 224, to show beside its heatmap."""
    with Image.open(io.BytesIO(file)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits: the server keeps the high byte
        image = Image.fromarray((np.asarray(image) >> 8).clip(max=255).astype(np.uint8))
    image = image.convert("RGB")
    short = min(image.size)  # sides and edges are rounded as in torchvision
    size = (RESIZED_SIDE * image.width // short, RESIZED_SIDE * image.height // short)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - CROPPED_SIDE) / 2) for side in image.size)
    return image.crop((left, top, left + CROPPED_SIDE, top + CROPPED_SIDE))
