"""Requests that must be refused with INVALID_ARGUMENT and a message that names the fault.

The refusals' test sends them, and ``make refusals`` writes their answers to docs/refusals.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc
from malformed_images import jpeg_of_frame, jpeg_of_scans, png_of_size, webp_of_chunks, with_segments
from PIL import Image
from tritonclient.utils import InferenceServerException

from tools.evaluation.image_files import encode
from tools.shapes.dataset import CLASSES, draw_scene

INVALID_ARGUMENT = "StatusCode.INVALID_ARGUMENT"
# Model settings, as the configs have them.
MAX_IMAGE_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Refusal:
    """A request that must be refused.

    ``what``: the fault in words; ``names``: text that the answer must contain; ``tensors``: name -> (dtype, array or
    raw bytes and shape), which replace those of a good request to ``model``.
    """

    group: str
    what: str
    names: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    model: str = "explain"
    tensors: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    outputs: Sequence[str] | None = None

    def send(self, client: tritonclient.grpc.InferenceServerClient) -> InferenceServerException | None:
        """The server's refusal, or None if it answered."""
        tensors = {**_GOOD_TENSORS[self.model](), **self.tensors}
        inputs = [_input(name, *tensor) for name, tensor in tensors.items() if name not in self.left_out]
        outputs = self.outputs and [tritonclient.grpc.InferRequestedOutput(name) for name in self.outputs]
        # Few steps, so that a request that is not refused fails the test soon; ``{"n_steps": None}`` leaves them out.
        parameters = {"n_steps": 2, **self.parameters} if self.model in ("explain", "integrated_gradients") else {}
        sent = {name: value for name, value in parameters.items() if value is not None}
        try:
            client.infer(self.model, inputs, outputs=outputs, parameters=sent, client_timeout=60)
        except InferenceServerException as refusal:
            return refusal
        return None


@dataclass(frozen=True)
class _Raw:
    """A tensor's bytes as they go over the wire."""

    content: bytes
    shape: Sequence[int]


def _input(name: str, dtype: str, values: np.ndarray | _Raw) -> tritonclient.grpc.InferInput:
    tensor = tritonclient.grpc.InferInput(name, list(values.shape), dtype)
    if isinstance(values, _Raw):
        tensor._raw_content = values.content  # the client's own checks would not allow it
    else:
        tensor.set_data_from_numpy(values)
    return tensor


def _scene() -> Image.Image:
    return Image.fromarray(draw_scene("test", 0, size=256).image)


def _files(*files: bytes) -> dict[str, tuple[str, np.ndarray]]:
    return {"IMAGE": ("BYTES", np.array(files, np.object_)[:, None])}


def _pixels(*values: float) -> tuple[str, np.ndarray]:
    pixels = np.zeros((len(values), 3, 224, 224), np.float32)
    pixels[:, 0, 0, 0] = values
    return "FP32", pixels


def _targets(*values: int) -> dict[str, tuple[str, np.ndarray]]:
    return {"TARGET": ("INT64", np.array(values, np.int64)[:, None])}


def _logits(count: int, classes: int, value: float = 0.0) -> tuple[str, np.ndarray]:
    return "FP32", np.full((count, classes), value, np.float32)


_GOOD_TENSORS: dict[str, Callable[[], dict[str, tuple[str, Any]]]] = {
    "explain": lambda: _files(encode(_scene(), "PNG")),
    "integrated_gradients": lambda: {"PIXELS": _pixels(0.0), "LOGITS": _logits(1, len(CLASSES))},
    "heatmap": lambda: {"PIXELS": _pixels(0.0), "RELEVANCE": ("FP32", np.zeros((1, 224, 224), np.float32))},
}


def _parameters(names: str, *cases: Mapping[str, Any], **options: Any) -> Iterator[Refusal]:
    for sent in cases:
        what = ", ".join(f"`{name}={_shown(value)}`" for name, value in sent.items() if value is not None)
        yield Refusal("Parameters", what, names, sent, **options)


def _shown(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) < 30 else f"{text[:12]}... ({len(text) - 2} characters)"


def cases() -> list[Refusal]:
    """Every request of the table."""
    return [*_parameter_cases(), *_tensor_cases(), *_image_cases()]


def _parameter_cases() -> Iterator[Refusal]:
    yield from _parameters(
        "'n_steps'",
        *({"n_steps": value} for value in (0, -1, 1001, 2**63 - 1, "2.5", "many", "", "nan", "1e400", True)),
        {"n_steps": 1, "method": "riemann_left"},
        {"n_steps": 2, "tolerance": "0.05"},
        {"n_steps": 2, "deadline_ms": 100},
        {"n_steps": 1000, "nt_samples": 6},
    )
    yield from _parameters("'method'", *({"method": value} for value in ("simpson", "GaussLegendre", 3, "", True)))
    yield from _parameters(
        "'method'",
        {"method": "riemann_middle", "tolerance": "0.1", "n_steps": None},
        {"method": "calibrated", "deadline_ms": 100, "n_steps": None},
    )
    yield from _parameters("'baseline'", {"baseline": "purple"}, {"baseline": 0}, {"baseline": "black,purple"})
    yield from _parameters(
        "'baseline'", {"baseline": "black,black"}, {"baseline": "images,black"}, {"baseline": "images"}
    )
    yield from _parameters("beside several baselines", {"baseline": "black,white", "nt_samples": 2})
    yield from _parameters("'output'", {"output": "loss"})
    yield from _parameters("'contrast'", *({"contrast": value} for value in (-1, len(CLASSES), "cat")))
    yield Refusal("Parameters", "`contrast=4` and `TARGET` 4", "'contrast'", {"contrast": 4}, tensors=_targets(4))
    yield from _parameters(
        "'tolerance'", *({"tolerance": value, "n_steps": None} for value in (0, "0.6", "nan", "inf", "small", True))
    )
    yield from _parameters(
        "'deadline_ms'", *({"deadline_ms": value, "n_steps": None} for value in (0, 60001, "-inf", "soon"))
    )
    yield from _parameters("'nt_samples'", *({"nt_samples": value} for value in (0, 51, "1.5")))
    yield from _parameters("'stdevs'", *({"stdevs": value} for value in ("-0.1", 11, "nan")))
    yield from _parameters("'seed'", {"seed": -1}, {"seed": str(2**63)})
    yield from _parameters("'parts'", {"parts": 0}, {"parts": 3}, {"parts": 2, "tolerance": "0.1", "n_steps": None})
    yield from _parameters("'part'", {"part": 1}, {"parts": 2, "part": 2})
    yield from _parameters("'overlay'", {"overlay": "disco"})
    yield from _parameters("'polarity'", {"polarity": 1})
    yield from _parameters("'clip_percentile'", *({"clip_percentile": value} for value in (101, "49.9", "nan", True)))
    yield from _parameters("'colormap'", {"colormap": "jet"})
    yield from _parameters("unknown parameter", {"steps": 20}, {"N_STEPS": 20}, {"x" * 5000: 1})
    yield from _parameters("triton_", {"triton_debug": 1})


def _tensor_cases() -> Iterator[Refusal]:
    classes = len(CLASSES)
    for target in (-2, classes, 2**40):
        yield Refusal("Tensors", f"`TARGET` {target}", f"not {target}", tensors=_targets(target))
    yield Refusal("Tensors", "`TARGET` as FP32", "TARGET", tensors={"TARGET": ("FP32", np.zeros((1, 1), np.float32))})
    yield Refusal("Tensors", "`TARGET` of two numbers", "TARGET", tensors={"TARGET": ("INT64", np.zeros((1, 2), int))})
    yield Refusal("Tensors", "two images, one `TARGET`", "batch", tensors={**_files(b"1", b"2"), **_targets(1)})
    yield Refusal("Tensors", "no input", "input", left_out=["IMAGE"])
    yield Refusal("Tensors", "`IMAGE` of two files", "IMAGE", tensors={"IMAGE": ("BYTES", _bytes([[b"1", b"2"]]))})
    yield Refusal("Tensors", "`IMAGE` as UINT8", "IMAGE", tensors={"IMAGE": ("UINT8", np.zeros((1, 1), np.uint8))})
    yield Refusal("Tensors", "an input of another name", "PICTURE", tensors={"PICTURE": ("BYTES", _bytes([[b"1"]]))})
    yield Refusal("Tensors", "an output of another name", "LOGITS", outputs=["LOGITS"])
    yield Refusal("Tensors", "33 images", "batch", tensors=_files(*[b"1"] * 33))
    short = _Raw(struct.pack("<I", 1000) + b"abc", (1, 1))
    yield Refusal("Tensors", "`IMAGE` shorter than its length says", "IMAGE", tensors={"IMAGE": ("BYTES", short)})
    huge = _Raw(b"\xff\xff\xff\xff", (1, 1))
    yield Refusal("Tensors", "`IMAGE` of 4 GiB, by its length", "IMAGE", tensors={"IMAGE": ("BYTES", huge)})
    to_gradients: dict[str, Any] = {"model": "integrated_gradients"}
    for name, value in (("NaN", np.nan), ("infinity", np.inf)):
        yield Refusal("Tensors", f"`PIXELS` with {name}", "PIXELS", tensors={"PIXELS": _pixels(value)}, **to_gradients)
        yield Refusal(
            "Tensors", f"`LOGITS` with {name}", "LOGITS", tensors={"LOGITS": _logits(1, classes, value)}, **to_gradients
        )
    yield Refusal("Tensors", "`PIXELS` of 3e38", "PIXELS", tensors={"PIXELS": _pixels(3e38)}, **to_gradients)
    small = {"PIXELS": ("FP32", np.zeros((1, 3, 32, 32), np.float32))}
    yield Refusal("Tensors", "`PIXELS` of 32 x 32", "PIXELS", tensors=small, **to_gradients)
    yield Refusal("Tensors", "`LOGITS` of 5 classes", "LOGITS", tensors={"LOGITS": _logits(1, 5)}, **to_gradients)
    yield Refusal("Tensors", "`LOGITS` of no class", "LOGITS", tensors={"LOGITS": _logits(1, 0)}, **to_gradients)
    yield Refusal("Tensors", "two `PIXELS`, one `LOGITS`", "batch", tensors={"PIXELS": _pixels(0, 0)}, **to_gradients)
    none = {
        "PIXELS": ("FP32", _Raw(bytes(4 * 3 * 224 * 224), (0, 3, 224, 224))),
        "LOGITS": ("FP32", _Raw(bytes(4 * classes), (0, classes))),
    }
    yield Refusal("Tensors", "`PIXELS` and `LOGITS` of a batch of none", "PIXELS", tensors=none, **to_gradients)
    many = {"PIXELS": _pixels(*[0] * 32), "LOGITS": _logits(32, classes)}
    yield Refusal("Tensors", "32 images, `n_steps=157`", "'n_steps'", {"n_steps": 157}, tensors=many, **to_gradients)
    wild = {"RELEVANCE": ("FP32", np.full((1, 224, 224), np.nan, np.float32))}
    yield Refusal("Tensors", "`RELEVANCE` with NaN, to `heatmap`", "RELEVANCE", tensors=wild, model="heatmap")


def _bytes(rows: list[list[bytes]]) -> np.ndarray:
    return np.array(rows, np.object_)


def _image_cases() -> Iterator[Refusal]:
    scene = _scene()
    png, jpeg, webp = (encode(scene, kind) for kind in ("PNG", "JPEG", "WEBP"))
    damaged = bytearray(png)
    damaged[60:70] = b"0123456789"
    for what, names, file in (
        ("no bytes", "empty", b""),
        ("text", "not a JPEG, PNG or WEBP", b"a text that is no image"),
        ("a page of HTML", "not a JPEG, PNG or WEBP", b"<!doctype html><title>404</title>"),
        ("an SVG drawing", "not a JPEG, PNG or WEBP", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("a ZIP archive", "not a JPEG, PNG or WEBP", b"PK\x03\x04" + b"\0" * 100),
        ("a GIF image", "not a JPEG, PNG or WEBP", encode(scene, "GIF")),
        ("a BMP image", "not a JPEG, PNG or WEBP", encode(scene, "BMP")),
        ("a TIFF image", "not a JPEG, PNG or WEBP", encode(scene, "TIFF")),
        ("half a PNG file", "cannot be decoded", png[: len(png) // 2]),
        ("half a JPEG file", "cannot be decoded", jpeg[: len(jpeg) // 2]),
        ("a JPEG file without its last 20 bytes", "the end of the JPEG file is missing", jpeg[:-20]),
        ("a JPEG file of 12 bits a sample", "12 bits a sample", jpeg_of_frame(jpeg, 0xC1, bits=12)),
        ("a lossless JPEG file", "a lossless JPEG file", jpeg_of_frame(jpeg, 0xC3)),
        ("a hierarchical JPEG file", "a hierarchical JPEG file", jpeg_of_frame(jpeg, 0xC5)),
        ("half a WebP file", "IMAGE", webp[: len(webp) // 2]),
        ("a PNG file's signature, then text", "header of the PNG file", b"\x89PNG\r\n\x1a\n and no more"),
        ("a JPEG file's first bytes", "header of the JPEG file", jpeg[:20]),
        ("a PNG file with other bytes in its data", "cannot be decoded", bytes(damaged)),
        ("a PNG file of 0 x 5 pixels", "header of the PNG file", png_of_size(0, 5)),
        ("a PNG file of 100000 x 100000 pixels", "pixels", png_of_size(100_000, 100_000)),
        ("a PNG file of 7000 x 8000 pixels", "7000 x 8000 pixels", png_of_size(7000, 8000)),
        ("a PNG file of 1 x 1000 pixels", "long side", png_of_size(1, 1000)),
        ("a JPEG file of 60 scans", "scans", jpeg_of_scans(60)),
        ("a JPEG file of 2000 empty segments", "segments", with_segments(jpeg, 2000, b"\xe5\x00\x02")),
        ("a JPEG file of 100 Exif segments", "segments", with_segments(jpeg, 100, b"\xe1\x00\x08Exif\0\0")),
        ("a JPEG file with a marker that is reserved", "marker", with_segments(jpeg, 1, b"\x02\x00\x02")),
        ("a PNG file of 30000 empty chunks", "chunks", png_of_size(300, 300, empty_chunks=30_000)),
        ("a WebP file of 30000 empty chunks", "chunks", webp_of_chunks(webp, 30_000)),
        ("32 MiB and a byte", "bytes", jpeg + b"\0" * (MAX_IMAGE_BYTES + 1 - len(jpeg))),
    ):
        yield Refusal("Images", what, names, tensors=_files(file))
    many = _files(*[encode(scene.resize((3000, 3000)), "JPEG")] * 12)
    yield Refusal("Images", "twelve images of 3000 x 3000 pixels", "108000000 pixels in 12 images", tensors=many)
