"""Encoded images to the classifier's input, with Pillow and torchvision's own functions.

``load_pixels`` equals, on the decoded image,

    Compose([Resize(256), CenterCrop(224), ToTensor(), Normalize(mean, std)])
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional

RESIZED_SIDE = 256
CROPPED_SIDE = 224
FORMATS = ("JPEG", "PNG", "WEBP")


class ImageError(ValueError):
    """The bytes are not an image that can be served; the message says why."""


def load_pixels(encoded: bytes, mean: list[float], std: list[float]) -> torch.Tensor:
    """Decode, orient, resize, crop and normalise one image.

    Args:
        encoded: a JPEG, PNG or WebP file.
        mean, std: per channel, for pixel values in [0, 1].

    Returns:
        float32 [3, 224, 224].

    Raises:
        ImageError: the bytes do not decode to an image.
    """
    image = decode_rgb(encoded)
    image = functional.resize(image, RESIZED_SIDE)
    image = functional.center_crop(image, CROPPED_SIDE)
    return functional.normalize(functional.to_tensor(image), mean, std, inplace=True)


def decode_rgb(encoded: bytes) -> Image.Image:
    """Decode a file to an RGB image, upright by its EXIF orientation.

    Grey and palette images are converted and alpha is dropped as ``Image.convert("RGB")`` does, which is what
    torchvision's dataset loaders use. 16-bit images keep their high byte, as torchvision's ``to_dtype`` does.

    Raises:
        ImageError: the bytes do not decode to an image.
    """
    if not encoded:
        raise ImageError("IMAGE is empty")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(max=255).astype(np.uint8))
        return image.convert("RGB")
    except Image.UnidentifiedImageError:
        raise ImageError(f"IMAGE is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"IMAGE cannot be decoded: {error}") from None
