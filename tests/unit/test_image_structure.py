"""Limits of a file's structure: at the limit, one beyond it, and photographs, which stay below."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import encode, scene_image
from image_structure import (
    MOST_CHUNKS,
    MOST_EXIF_SEGMENTS,
    MOST_JPEG_SCANS,
    MOST_JPEG_SEGMENTS,
    ImageError,
    check_structure,
)
from malformed_images import jpeg_of_frame, png_of_size, webp_of_chunks, with_segments
from PIL import Image, ImageCms

START, END = b"\xff\xd8", b"\xff\xd9"
COMMENT = b"\xff\xfe\x00\x04ab"
EXIF = b"\xff\xe1\x00\x08Exif\0\0"
XMP = b"\xff\xe1\x00\x07http:"
SCAN = b"\xff\xda\x00\x03\x01" + 5 * b"\x12"


def photograph(image_format: str, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, image_format, **options)
    return file.getvalue()


def jpeg(*segments: bytes) -> bytes:
    return START + b"".join(segments) + END


def png(chunks: int) -> bytes:
    """A file of so many chunks, the last of which is its end."""
    empty = struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + (chunks - 1) * empty + end


def webp(chunks: int, content: bytes = b"") -> bytes:
    chunk = b"ABCD" + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", 4 + chunks * len(chunk)) + b"WEBP" + chunks * chunk


LIMITS: dict[str, tuple[int, Callable[[int], bytes], str]] = {
    "JPEG segments": (MOST_JPEG_SEGMENTS, lambda count: jpeg(count * COMMENT), "a JPEG file of too many segments"),
    "Exif segments": (MOST_EXIF_SEGMENTS, lambda count: jpeg(count * EXIF), "a JPEG file of too many segments"),
    "JPEG scans": (MOST_JPEG_SCANS, lambda count: jpeg(count * SCAN), "a JPEG file of over 50 scans"),
    "PNG chunks": (MOST_CHUNKS, png, "a PNG file of over 20000 chunks"),
    "WebP chunks": (MOST_CHUNKS, webp, "a WebP file of over 20000 chunks"),
    "WebP chunks of odd length": (MOST_CHUNKS, lambda count: webp(count, b"odd"), "a WebP file of over 20000 chunks"),
}


@pytest.mark.parametrize(("most", "file", "message"), LIMITS.values(), ids=LIMITS)
def test_as_many_parts_as_the_limit_are_taken_and_one_more_is_refused(
    most: int, file: Callable[[int], bytes], message: str
) -> None:
    check_structure(file(most))
    with pytest.raises(ImageError, match=f"^IMAGE is {message}$"):
        check_structure(file(most + 1))


PHOTOGRAPHS = {
    "jpeg": photograph("JPEG"),
    "progressive jpeg": photograph("JPEG", progressive=True, quality=100, subsampling=0),
    "jpeg with restarts": photograph("JPEG", restart_marker_blocks=1),
    "jpeg with a profile": photograph(
        "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    "jpeg with a comment of markers": photograph("JPEG", comment=200 * b"\xff\x02\xff\xd8"),
    "png": photograph("PNG", compress_level=0),
    "webp": photograph("WEBP", lossless=True),
}


@pytest.mark.parametrize("file", PHOTOGRAPHS.values(), ids=PHOTOGRAPHS)
def test_what_encoders_write_is_taken(file: bytes) -> None:
    check_structure(file)


@pytest.mark.parametrize("file", PHOTOGRAPHS.values(), ids=PHOTOGRAPHS)
def test_a_file_may_end_anywhere(file: bytes) -> None:
    """Whether a decoder accepts the file does not matter here."""
    for length in (*range(40), *range(40, len(file), 997)):
        check_structure(file[:length])


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"text", b"GIF89a", b"BM" + bytes(100), bytes(100_000)], ids=lambda each: str(each[:6])
)
def test_what_is_none_of_the_formats_is_left_to_the_decoder(content: bytes) -> None:
    check_structure(content)


def test_other_data_than_exif_is_no_exif_segment() -> None:
    check_structure(jpeg((MOST_EXIF_SEGMENTS + 1) * XMP))


def test_markers_inside_a_segment_are_its_content() -> None:
    content = 2 * MOST_JPEG_SEGMENTS * COMMENT + b"\xff\x02" + END
    check_structure(jpeg(b"\xff\xe5" + struct.pack(">H", 2 + len(content)) + content))


def test_the_scans_of_a_thumbnail_count_too() -> None:
    """A decoder that loses its place would find them."""
    content = (MOST_JPEG_SCANS + 1) * b"\xff\xda"
    with pytest.raises(ImageError, match="over 50 scans"):
        check_structure(jpeg(b"\xff\xe5" + struct.pack(">H", 2 + len(content)) + content))


def test_what_follows_the_end_of_a_jpeg_is_no_part_of_it() -> None:
    check_structure(jpeg(SCAN) + 2 * MOST_JPEG_SEGMENTS * COMMENT + 2 * MOST_JPEG_SCANS * SCAN + b"\xff\x02")


@pytest.mark.parametrize("code", [0x01, 0x02, 0x4F, 0xBF])
def test_a_reserved_marker_is_named(code: int) -> None:
    with pytest.raises(ImageError, match=f"a marker that none has, {code:#04x}"):
        check_structure(jpeg(COMMENT, bytes((0xFF, code))))


@pytest.mark.parametrize("inside", [b"\xff\x00", *(bytes((0xFF, code)) for code in range(0xD0, 0xD8)), b"\xff\xff\xff"])
def test_what_stands_inside_a_scan_is_no_segment(inside: bytes) -> None:
    check_structure(jpeg(SCAN, 2 * MOST_JPEG_SEGMENTS * (inside + bytes(2))))


def test_a_length_beyond_the_file_ends_the_count() -> None:
    check_structure(b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIDAT" + bytes(13 * MOST_CHUNKS))


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(ImageError, ValueError)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_what_follows_the_end_of_another_file_is_no_part_of_it(kind: str) -> None:
    check_structure(PHOTOGRAPHS[kind] + bytes(13 * MOST_CHUNKS))


def test_a_marker_that_no_jpeg_has_is_refused_by_itself():
    with pytest.raises(ImageError, match="with a marker that none has, 0x02"):
        check_structure(with_segments(encode(scene_image(0, 300), "JPEG"), 1, b"\x02\x00\x02"))


def test_files_of_many_segments_or_chunks_are_refused_before_they_are_opened():
    jpeg, webp = encode(scene_image(0, 300), "JPEG"), encode(scene_image(0, 300), "WEBP")
    exif, other = b"\xe1\x00\x08Exif\0\0", b"\xe5\x00\x02"
    for most, file in (
        (MOST_JPEG_SEGMENTS, lambda count: with_segments(jpeg, count, other)),
        (MOST_EXIF_SEGMENTS, lambda count: with_segments(jpeg, count, exif)),
        (MOST_CHUNKS, lambda count: png_of_size(8, 8, count)),
        (MOST_CHUNKS, lambda count: webp_of_chunks(webp, count)),
    ):
        check_structure(file(most // 2))
        with pytest.raises(ImageError, match=r"too many segments|of over 20000 chunks"):
            check_structure(file(2 * most))


@pytest.mark.parametrize(("code", "bits", "message"), [(0xC1, 12, "12 bits a sample"), (0xC3, 8, "lossless")])
def test_frames_that_are_not_decoded_are_refused(code: int, bits: int, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        check_structure(jpeg_of_frame(photograph("JPEG"), code, bits))
