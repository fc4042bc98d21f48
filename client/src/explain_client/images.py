"""Converts a caller's image to the bytes of a file, and a file to what the classifier sees of it."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]

PNG_MODES = ("1", "L", "LA", "I;16", "I;16B", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class View:
    """The part of an image that the classifier sees, as the server's `preprocess` makes it.

    Attributes:
        resize: pixels of the shorter side, or (height, width) exactly.
        crop: (height, width) of the centre that is cropped then.
        interpolation: of the resizing: nearest, bilinear, bicubic or lanczos.
        channels: 3, or 1 if the classifier sees grey images.
    """

    resize: int | tuple[int, int] = 256
    crop: tuple[int, int] = (224, 224)
    interpolation: str = "bilinear"
    channels: int = 3


DEFAULT_VIEW = View()


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


def as_seen(file: bytes, view: View = DEFAULT_VIEW) -> Image.Image:
    """The classifier's view of an image file, RGB, as large as its heatmap, to show beside it.

    Args:
        file: the encoded image.
        view: of the server's classifier: ``ExplainClient.view``.
    """
    with Image.open(io.BytesIO(file)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits: the server keeps the high byte
        image = Image.fromarray((np.asarray(image) >> 8).clip(max=255).astype(np.uint8))
    image = image.convert("L" if view.channels == 1 else "RGB")
    if isinstance(view.resize, int):  # sides and edges are rounded as in torchvision
        short = min(image.size)
        size = (view.resize * image.width // short, view.resize * image.height // short)
    else:
        size = (view.resize[1], view.resize[0])
    image = image.resize(size, Image.Resampling[view.interpolation.upper()])
    height, width = view.crop
    left, top = _edge(image.width, width), _edge(image.height, height)
    return image.crop((left, top, left + width, top + height)).convert("RGB")


def _edge(side: int, cropped: int) -> int:
    """Where the centre begins; below 0 if a black border is added."""
    return round((side - cropped) / 2) if side >= cropped else -((cropped - side) // 2)
