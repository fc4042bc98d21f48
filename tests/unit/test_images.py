"""A caller's images as files, and the crop that the classifier sees, against torchvision's."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image, ImageCms, ImageOps
from scripted_server import Scripted, scripted_server
from torchvision import transforms
from tritonclient.grpc import model_config_pb2, service_pb2

from explain_client import AsyncExplainClient, ExplainClient
from explain_client.errors import ExplainError, UnavailableError
from explain_client.images import DEFAULT_VIEW, View, as_seen, encoded
from explain_client.protocol import read_view
from tools.paths import MODEL_REPOSITORY

TORCHVISION = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])


def picture(width: int, height: int) -> Image.Image:
    """Colours that change everywhere, smoothly enough to be resized."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def decoded(file: bytes) -> Image.Image:
    with Image.open(io.BytesIO(file)) as opened:
        opened.load()
        return opened


def test_bytes_and_files_are_sent_as_they_are(tmp_path: Path) -> None:
    content = file_of(picture(40, 30), "JPEG")
    (tmp_path / "picture.jpg").write_bytes(content)
    assert encoded(content) is content
    assert encoded(tmp_path / "picture.jpg") == encoded(str(tmp_path / "picture.jpg")) == content


def test_what_the_bytes_are_is_the_servers_to_judge() -> None:
    assert encoded(b"no image") == b"no image"
    assert encoded(b"") == b""


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        encoded(tmp_path / "absent.png")
    with pytest.raises(OSError, match="directory"):
        encoded(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "I;16"])
def test_a_pil_image_becomes_a_png_file_without_loss(mode: str) -> None:
    image = picture(40, 30).convert("L").convert("I;16") if mode == "I;16" else picture(40, 30).convert(mode)
    sent = decoded(encoded(image))
    assert (sent.format, sent.mode, sent.size) == ("PNG", mode, (40, 30))
    np.testing.assert_array_equal(np.asarray(sent.convert("RGBA")), np.asarray(image.convert("RGBA")))


@pytest.mark.parametrize("shape", [(30, 40, 3), (30, 40), (1, 1, 3)], ids=str)
def test_an_array_becomes_a_png_file_without_loss(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = decoded(encoded(array))
    assert image.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), array)


def test_an_array_need_not_lie_in_one_piece() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 30, 40), np.uint8).transpose(1, 2, 0)[::-1, ::2]
    np.testing.assert_array_equal(np.asarray(decoded(encoded(array))), array)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((8, 8, 3)), "float64 [8, 8, 3]"),
        (np.zeros((8, 8, 4), np.uint8), "uint8 [8, 8, 4]"),
        (np.zeros((3, 8, 8), np.uint8), "uint8 [3, 8, 8]"),
        (np.zeros((8, 8), np.uint16), "uint16 [8, 8]"),
        (np.zeros((1, 8, 8, 3), np.uint8), "uint8 [1, 8, 8, 3]"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_another_array_is_refused_with_what_it_is(array: np.ndarray, said: str) -> None:
    with pytest.raises(TypeError) as refusal:
        encoded(array)
    assert str(refusal.value).endswith(f"must be uint8 [height, width, 3] or [height, width], not {said}")


@pytest.mark.parametrize(
    "size", [(256, 256), (300, 300), (512, 256), (400, 320), (320, 400), (224, 448), (10, 10)], ids=str
)
def test_what_is_seen_is_torchvisions_centre_crop(size: tuple[int, int]) -> None:
    image = picture(*size)
    seen = as_seen(file_of(image))
    assert (seen.mode, seen.size) == ("RGB", (224, 224))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(TORCHVISION(image)))


@pytest.mark.parametrize("size", [(256, 256), (640, 427), (411, 260), (37, 53), (10, 300)], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        View(146, (128, 128)),
        View(342, (299, 299)),
        View(384, (384, 384), "bicubic"),
        View((224, 224), (224, 224), "lanczos"),
        View((100, 180), (96, 160), "nearest"),
        View(64, (64, 181)),
        View(28, (28, 28), channels=1),
    ],
    ids=str,
)
def test_what_is_seen_follows_the_servers_rule(size: tuple[int, int], view: View) -> None:
    image = picture(*size)
    mode = transforms.InterpolationMode(view.interpolation)
    rule = transforms.Compose([transforms.Resize(view.resize, mode), transforms.CenterCrop(view.crop)])
    seen = as_seen(file_of(image), view)
    assert (seen.mode, seen.size) == ("RGB", view.crop[::-1])
    expected = rule(image.convert("L" if view.channels == 1 else "RGB")).convert("RGB")
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(expected))


def test_the_servers_rule_is_in_the_config_of_preprocess() -> None:
    config = tracked_config()
    assert read_view(config) == DEFAULT_VIEW
    config.output[0].dims[:] = [1, 96, 160]
    config.parameters["resize"].string_value = "100, 180"
    config.parameters["interpolation"].string_value = "bicubic"
    assert read_view(config) == View((100, 180), (96, 160), "bicubic", 1)
    for name in ("resize", "interpolation"):  # as in older repositories
        del config.parameters[name]
    assert read_view(config) == View(256, (96, 160), "bilinear", 1)


def test_a_config_without_images_is_an_error() -> None:
    with pytest.raises(ExplainError, match="the server's model 'preprocess' has no images PIXELS"):
        read_view(model_config_pb2.ModelConfig(name="preprocess"))


def tracked_config() -> Any:
    text = (MODEL_REPOSITORY / "preprocess" / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


class Configured(Scripted):
    """Answers requests for a model's config."""

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests += 1
        if self.requests <= self.unavailable:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restricted")
        assert request.name == "preprocess"
        return service_pb2.ModelConfigResponse(config=tracked_config())


def test_clients_ask_for_the_servers_rule_once() -> None:
    async def views(url: str) -> list[View]:
        async with AsyncExplainClient(url) as client:
            return [await client.view() for _ in range(2)]

    with scripted_server(0, Configured) as (servicer, url):
        with ExplainClient(url) as client:
            assert [client.view() for _ in range(2)] == [DEFAULT_VIEW] * 2
        assert servicer.requests == 1
        assert asyncio.run(views(url)) == [DEFAULT_VIEW] * 2
        assert servicer.requests == 2


def test_a_server_that_does_not_tell_its_rule_is_an_error() -> None:
    with (
        scripted_server(1, Configured) as (_, url),
        ExplainClient(url) as client,
        pytest.raises(UnavailableError, match="restricted"),
    ):
        client.view()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_what_is_seen_stands_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = file_of(picture(512, 256), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(decoded(file))
    assert upright.size == ((512, 256) if orientation == 3 else (256, 512))
    np.testing.assert_array_equal(np.asarray(as_seen(file)), np.asarray(TORCHVISION(upright)))


def test_what_is_seen_of_a_jpeg_file_without_its_end_marker_is_the_same() -> None:
    file = file_of(picture(300, 300), "JPEG")
    for missing in (1, 2):
        np.testing.assert_array_equal(np.asarray(as_seen(file[:-missing])), np.asarray(as_seen(file)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_what_is_seen_is_rgb_whatever_the_file_holds(mode: str) -> None:
    image = picture(300, 300).convert(mode)
    file = file_of(image, "JPEG" if mode == "CMYK" else "PNG")
    expected = TORCHVISION(decoded(file).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(as_seen(file)), np.asarray(expected))


@pytest.mark.parametrize("size", [(640, 427), (411, 260), (260, 411), (320, 200)], ids=str)
def test_what_is_seen_is_torchvisions_crop_where_sides_are_no_whole_numbers(size: tuple[int, int]) -> None:
    image = picture(*size)
    np.testing.assert_array_equal(np.asarray(as_seen(file_of(image))), np.asarray(TORCHVISION(image)))


def test_what_is_seen_of_16_bits_is_their_high_byte() -> None:
    values = np.linspace(0, 65535, 300 * 300).reshape(300, 300).astype(np.uint16)
    expected = TORCHVISION(Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(as_seen(file_of(Image.fromarray(values)))), np.asarray(expected))


def in_mode(mode: str) -> Image.Image:
    """A picture in a mode that PNG lacks."""
    image = picture(40, 30)
    if mode == "LAB":
        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
        assert converted is not None
        return converted
    through = {"PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa"), "I": ("L", "I"), "F": ("L", "F")}.get(mode, (mode,))
    for step in through:
        image = image.convert(step)
    assert image.mode == mode
    return image


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "PA", "I", "F"])
def test_a_pil_image_of_a_mode_that_png_lacks_is_sent_as_pillow_converts_it(mode: str) -> None:
    seen = as_seen(encoded(in_mode(mode)), View((30, 40), (30, 40)))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(in_mode(mode).convert("RGB")))


def test_grey_with_premultiplied_alpha_is_sent_without_it() -> None:
    grey = picture(40, 30).convert("LA")
    grey.putalpha(128)
    sent = np.asarray(decoded(encoded(grey.convert("La"))).convert("L"), int)
    assert np.abs(sent - np.asarray(grey.convert("L"), int)).max() <= 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((4, 4), 0.5, np.float32), "mode F must have values from 0 to 255; up to 0.5 it is black"),
        (np.full((4, 4), 255.5, np.float32), "mode F must have values from 0 to 255, not from 255.5 to 255.5"),
        (np.full((4, 4), -1, np.float32), "mode F must have values from 0 to 255, not from -1 to -1"),
        (np.full((4, 4), np.nan, np.float32), "mode F must have values from 0 to 255, not from nan to nan"),
        (np.full((4, 4), 65536, np.int32), "mode I must have values from 0 to 65535, not from 65536 to 65536"),
        (np.full((4, 4), -1, np.int32), "mode I must have values from 0 to 65535, not from -1 to -1"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_pil_image_of_numbers_that_are_no_shades_is_refused(values: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encoded(Image.fromarray(values))


def test_a_black_pil_image_of_numbers_is_sent() -> None:
    for dtype in (np.float32, np.int32):
        assert decoded(encoded(Image.fromarray(np.zeros((4, 4), dtype)))).getextrema() == (0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pil_image_is_sent_upright_as_its_file_is_seen(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = file_of(picture(320, 200), "JPEG", exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        sent = encoded(opened)
        assert opened.getexif()[0x0112] == orientation  # the caller's image is left as it is
    np.testing.assert_array_equal(np.asarray(as_seen(sent)), np.asarray(as_seen(file)))
    upright = ImageOps.exif_transpose(decoded(file))
    np.testing.assert_array_equal(np.asarray(decoded(sent)), np.asarray(upright))


@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bits_are_sent_upright_as_their_file_is_seen(orientation: int) -> None:
    values = np.linspace(0, 65535, 320 * 200).reshape(200, 320).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = file_of(Image.fromarray(values), exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        sent = encoded(opened)
    np.testing.assert_array_equal(np.asarray(decoded(sent)), values if orientation == 1 else np.rot90(values, -1))
    np.testing.assert_array_equal(np.asarray(as_seen(sent)), np.asarray(as_seen(file)))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_a_pil_image_of_16_bits_keeps_them(mode: str) -> None:
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode])
    image = Image.frombytes(mode, (40, 30), values.tobytes())
    np.testing.assert_array_equal(np.asarray(decoded(encoded(image))), values)
