"""`preprocess` against torchvision's own transform."""

import io

import numpy as np
import pytest
from conftest import MEAN, STD, TORCHVISION_TRANSFORM, encode, scene_image
from image_decoding import ImageError, decode_rgb, load_pixels
from PIL import Image, ImageOps

GRADIENT_16_BIT = np.linspace(0, 65535, 300 * 280).reshape(300, 280).astype(np.uint16)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def rotated_by_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    return encode(image, "JPEG", exif=exif)


# Name -> (file, the RGB image that torchvision's transform is given).
SCENE = scene_image(0, 300)
WIDE, TALL, SMALL = SCENE.resize((500, 260)), SCENE.resize((240, 411)), SCENE.resize((37, 53))
CASES = {
    "jpeg": (encode(WIDE, "JPEG"), Image.open(io.BytesIO(encode(WIDE, "JPEG")))),
    "png": (encode(TALL), TALL),
    "webp": (encode(SCENE, "WEBP", lossless=True), SCENE),
    "small": (encode(SMALL), SMALL),
    "one pixel": (encode(SCENE.resize((1, 1))), SCENE.resize((1, 1))),
    "grey": (encode(SCENE.convert("L")), SCENE.convert("L").convert("RGB")),
    "grey with alpha": (encode(SCENE.convert("LA")), SCENE.convert("L").convert("RGB")),
    "black and white": (encode(SCENE.convert("1")), SCENE.convert("1").convert("RGB")),
    "palette": (encode(SCENE.convert("P")), SCENE.convert("P").convert("RGB")),
    "alpha": (encode(with_alpha(TALL)), TALL),
    "cmyk": (encode(WIDE.convert("CMYK"), "JPEG"), Image.open(io.BytesIO(encode(WIDE.convert("CMYK"), "JPEG")))),
    "16 bit": (
        encode(Image.fromarray(GRADIENT_16_BIT)),
        Image.fromarray((GRADIENT_16_BIT >> 8).astype(np.uint8)).convert("RGB"),
    ),
    "exif": (
        rotated_by_exif(WIDE),
        ImageOps.exif_transpose(Image.open(io.BytesIO(rotated_by_exif(WIDE)))),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_torchvision(case):
    file, image = CASES[case]
    expected = TORCHVISION_TRANSFORM(image.convert("RGB"))
    found = load_pixels(file, list(MEAN), list(STD))
    assert found.shape == (3, 224, 224)
    # Float32 arithmetic in the same order: equal, but for a last bit.
    assert (found - expected).abs().max() <= 1e-5


def test_exif_orientation_turns_the_image():
    assert decode_rgb(rotated_by_exif(WIDE)).size == (WIDE.height, WIDE.width)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "empty"),
        (b"not an image", "not a JPEG, PNG or WEBP"),
        (encode(SCENE, "GIF"), "not a JPEG, PNG or WEBP"),
        (encode(SCENE)[:2000], "cannot be decoded"),
        (encode(SCENE, "JPEG")[:2000], "cannot be decoded"),
    ],
    ids=["empty", "text", "gif", "truncated png", "truncated jpeg"],
)
def test_what_is_no_image_is_refused_with_the_reason(file, message):
    with pytest.raises(ImageError, match=message):
        decode_rgb(file)
