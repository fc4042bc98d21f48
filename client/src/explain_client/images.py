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

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
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
    """The bytes to send: a file's own, else a PNG file.

    A PIL image is turned upright by its EXIF orientation, as the server turns files. In a mode that PNG lacks it is
    sent as ``Image.convert("RGB")`` makes it. Values of the mode ``F`` are those of 8 bits, from 0 to 255. Values of
    the mode ``I`` are, too, or those of 16 bits where one is above 255.

    Args:
        image: a path, the bytes of a JPEG, PNG or WebP file, a PIL image, or a uint8 array [height, width, 3] or
            [height, width].

    Raises:
        OSError: the file cannot be read.
        TypeError: an array of another dtype or shape.
        ValueError: a PIL image of a mode that cannot be converted, or of mode ``F`` or ``I`` with values out of range.
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
        file = io.BytesIO()
        _png_mode(ImageOps.exif_transpose(image)).save(file, "PNG", compress_level=1)
        return file.getvalue()
    return Path(image).read_bytes()


def _png_mode(image: Image.Image) -> Image.Image:
    """The image in a mode that PNG has."""
    if image.mode in PNG_MODES:
        return image
    if image.mode in ("I", "F"):
        return _of_numbers(image)
    try:
        # Pillow converts grey with premultiplied alpha only to grey with alpha.
        return image.convert("LA" if image.mode == "La" else "RGB")
    except ValueError as error:
        raise ValueError(f"a PIL image of mode {image.mode} cannot be sent: {error}; convert it to RGB") from None


def _of_numbers(image: Image.Image) -> Image.Image:
    """An image of the mode ``I`` or ``F``, whose values may be any numbers, in 8 or 16 bits."""
    values = np.asarray(image)
    least, most = values.min(), values.max()
    largest = 65535 if image.mode == "I" else 255
    if not (least >= 0 and most <= largest):  # or NaN
        raise ValueError(
            f"a PIL image of mode {image.mode} must have values from 0 to {largest}, not from {least:g} to {most:g}"
        )
    if image.mode == "F" and 0 < most <= 1:
        raise ValueError(f"a PIL image of mode F must have values from 0 to 255; up to {most:g} it is black")
    return image.convert("I;16" if most > 255 else "L")


def photograph(file: bytes) -> Image.Image:
    """An image file as people see it: RGB, turned upright by its EXIF orientation, at its own resolution.

    Raises:
        OSError: the file is broken, or no image that Pillow knows.
    """
    try:
        return _upright(file).convert("RGB")
    except Exception as error:  # Pillow's decoders raise what they meet: ValueError, SyntaxError, struct.error, ...
        raise OSError(f"the image cannot be read: {error}") from error


def as_seen(file: bytes, view: View = DEFAULT_VIEW) -> Image.Image:
    """The classifier's view of an image file, RGB, as large as its heatmap, to show beside it.

    Args:
        file: the encoded image.
        view: of the server's classifier: ``ExplainClient.view``.
    """
    image = _upright(file).convert("L" if view.channels == 1 else "RGB")
    image = image.resize(_resized(image.size, view), Image.Resampling[view.interpolation.upper()])
    height, width = view.crop
    left, top = _edge(image.width, width), _edge(image.height, height)
    return image.crop((left, top, left + width, top + height)).convert("RGB")


def seen_box(size: tuple[int, int], view: View = DEFAULT_VIEW) -> tuple[float, float, float, float]:
    """The part of a photograph that the classifier sees: left, top, right and bottom, in pixels of the photograph.

    It is larger than the photograph where a black border is added.

    Args:
        size: (width, height) of the upright photograph.
        view: of the server's classifier.
    """
    resized, crop = _resized(size, view), view.crop[::-1]
    scales = [own / new for own, new in zip(size, resized)]
    edges = [_edge(new, cropped) for new, cropped in zip(resized, crop)]
    left, top = (edge * scale for edge, scale in zip(edges, scales))
    right, bottom = ((edge + cropped) * scale for edge, cropped, scale in zip(edges, crop, scales))
    return left, top, right, bottom


def share_cut_away(size: tuple[int, int], view: View = DEFAULT_VIEW) -> float:
    """Share of a photograph's area, in [0, 1], that the classifier does not see; arguments as for ``seen_box``."""
    left, top, right, bottom = seen_box(size, view)
    seen = (min(right, size[0]) - max(left, 0.0)) * (min(bottom, size[1]) - max(top, 0.0))
    return max(0.0, 1 - seen / (size[0] * size[1]))


def _upright(file: bytes) -> Image.Image:
    # The server accepts a JPEG file whose end marker is missing. Behind one, another one says nothing.
    whole = file + JPEG_END if file.startswith(JPEG_START) else file
    with Image.open(io.BytesIO(whole)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits: the server keeps the high byte
        image = Image.fromarray((np.asarray(image) >> 8).clip(max=255).astype(np.uint8))
    return image


def _resized(size: tuple[int, int], view: View) -> tuple[int, int]:
    """(width, height) before the crop."""
    if isinstance(view.resize, int):  # sides and edges are rounded as in torchvision
        return view.resize * size[0] // min(size), view.resize * size[1] // min(size)
    return view.resize[1], view.resize[0]


def _edge(side: int, cropped: int) -> int:
    """Where the centre begins; below 0 if a black border is added."""
    return round((side - cropped) / 2) if side >= cropped else -((cropped - side) // 2)
