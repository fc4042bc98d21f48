"""Checks the structure of an image file, from its bytes, before a decoder reads it.

A decoder's time depends not only on bytes and pixels, but also on the scans of a JPEG file and on the number of
segments or chunks. A file of a few megabytes can have millions of them and take hours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

# Each scan of a progressive JPEG updates all its pixels. Encoders make about ten scans; 200 scans of 75 bytes each took
# 9 s on 49 million pixels (2 cores).
MOST_JPEG_SCANS = 50
# A photograph has about ten, with a depth map about a hundred. Pillow copies all Exif data anew for each further Exif
# segment, and takes 2 microseconds and 130 bytes for an empty segment.
MOST_JPEG_SEGMENTS = 1000
MOST_EXIF_SEGMENTS = 8
# Encoders write data in chunks of 8 KB and more; Pillow takes 4 microseconds for an empty one.
MOST_CHUNKS = 20_000

# Any marker except those inside a scan: stuffed bytes, restarts and fill bytes.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_START_OF_IMAGE, _JPEG_END_OF_IMAGE, JPEG_START_OF_SCAN, _JPEG_APP1 = 0xD8, 0xD9, 0xDA, 0xE1
# No JPEG file has them. libjpeg skips such a marker, but a parser that skips its length, too, misses what follows.
_JPEG_RESERVED = range(0x01, 0xC0)
# Codes of frames; what those are called that are not decoded (ITU-T T.81, table B.1).
JPEG_FRAMES = {
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC9, 0xCA), ""),
    **dict.fromkeys((0xC3, 0xCB), "lossless"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"),
}


class ImageError(ValueError):
    """The bytes are not an image that can be served; the message says why."""


def check_structure(encoded: bytes) -> bool:
    """Refuse files with more scans, segments or chunks than images have, and JPEG files that no decoder here reads.

    Returns:
        Whether the file is a JPEG file without an end marker.

    Raises:
        ImageError: there are too many, or a marker that no JPEG file has, or a frame of another kind than is decoded.
    """
    if encoded.startswith(b"\xff\xd8"):
        return _check_jpeg(encoded)
    if encoded.startswith(b"\x89PNG"):
        _check_chunks(encoded, "PNG", 8, len(encoded), "big", length_at=0, around=12, aligned_to=1)
    elif encoded.startswith(b"RIFF"):
        end = min(len(encoded), 8 + int.from_bytes(encoded[4:8], "little"))
        _check_chunks(encoded, "WebP", 12, end, "little", length_at=4, around=8, aligned_to=2)
    return False


def jpeg_markers(encoded: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG file up to that of its end: their codes, and where what follows each of them begins.

    A segment, which begins with two bytes of its length, follows all but the markers of start and end.
    """
    position = 2
    while marker := _JPEG_MARKER.search(encoded, position):
        code, position = marker[0][1], marker.end()
        yield code, position
        if code == _JPEG_END_OF_IMAGE:
            return
        if code != _JPEG_START_OF_IMAGE:
            position += int.from_bytes(encoded[position : position + 2], "big")


def _check_jpeg(encoded: bytes) -> bool:
    segments, exif_segments = 0, 0
    end, is_ended = len(encoded), False
    for code, position in jpeg_markers(encoded):
        if code == _JPEG_END_OF_IMAGE:
            end, is_ended = position, True  # phones append videos and further pictures
            break
        if code in _JPEG_RESERVED:
            raise ImageError(f"IMAGE is a JPEG file with a marker that none has, {code:#04x}")
        if code == _JPEG_START_OF_IMAGE:
            continue
        segments += 1
        if code in JPEG_FRAMES:
            _check_frame(code, encoded[position + 2 : position + 3])
        exif_segments += code == _JPEG_APP1 and encoded.startswith(b"Exif", position + 2)
        if segments > MOST_JPEG_SEGMENTS or exif_segments > MOST_EXIF_SEGMENTS:
            raise ImageError("IMAGE is a JPEG file of too many segments")
    # All scans in the bytes are counted: a decoder may find scans where this parser finds none.
    if encoded.count(bytes((0xFF, JPEG_START_OF_SCAN)), 0, end) > MOST_JPEG_SCANS:
        raise ImageError(f"IMAGE is a JPEG file of over {MOST_JPEG_SCANS} scans")
    return not is_ended


def _check_frame(code: int, bits: bytes) -> None:
    """Refuse a frame of a kind that is not decoded, by the code of its marker and its bits a sample."""
    if JPEG_FRAMES[code]:
        raise ImageError(f"IMAGE is a {JPEG_FRAMES[code]} JPEG file; baseline and progressive ones are decoded")
    if bits and bits[0] != 8:
        raise ImageError(f"IMAGE is a JPEG file of {bits[0]} bits a sample; those of 8 bits are decoded")


def _check_chunks(
    encoded: bytes,
    kind: str,
    position: int,
    end: int,
    byte_order: Literal["little", "big"],
    length_at: int,
    around: int,
    aligned_to: int,
) -> None:
    """Check the number of chunks up to ``end``; ``around`` is the bytes of a chunk besides its content."""
    chunks = 0
    while position + around <= end:
        is_last = kind == "PNG" and encoded.startswith(b"IEND", position + 4)
        length = int.from_bytes(encoded[position + length_at : position + length_at + 4], byte_order)
        position += around + length + -length % aligned_to
        chunks += 1
        if chunks > MOST_CHUNKS:
            raise ImageError(f"IMAGE is a {kind} file of over {MOST_CHUNKS} chunks")
        if is_last:
            return
