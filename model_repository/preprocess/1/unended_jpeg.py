"""JPEG files whose end marker is missing, as an interrupted transfer leaves them.

Browsers and phones show such a file. It is accepted if it lacks nothing else. A decoder fills in what is missing, and
does not tell whether it did. So the file is decoded twice, with different bytes behind its own: if pixels are missing,
they depend on these bytes.
"""

from __future__ import annotations

import io
from collections import defaultdict

import numpy as np
from image_structure import JPEG_FRAMES, JPEG_START_OF_SCAN, jpeg_markers
from PIL import Image

END = b"\xff\xd9"
# libjpeg replaces a unit of blocks that the end marker cuts off, whatever its first bits. The longest unit, 10 blocks
# of 64 coefficients of up to 26 bits, takes 2,080 bytes. Where a restart marker comes next, all before it is skipped.
_OTHER_BITS = b"\xaa" * 4096
_OTHER_BYTES = _OTHER_BITS + b"".join(bytes((0xFF, code)) + _OTHER_BITS for code in range(0xD0, 0xD8))
_COEFFICIENTS = 64


def ended(encoded: bytes, added: bytes = b"") -> bytes:
    """A JPEG file with bytes added to its own and an end marker, whose first half the file may have."""
    return encoded.removesuffix(b"\xff") + added + END


def lacks_pixels(encoded: bytes, image: Image.Image) -> bool:
    """Whether a file without an end marker lacks more than that.

    Args:
        encoded: the file.
        image: opened from ``ended(encoded)``; decoded in place if the file has all scans.
    """
    if not _has_all_scans(encoded):
        return True
    image.load()
    other = Image.open(io.BytesIO(ended(encoded, _OTHER_BYTES)), formats=("JPEG",))
    return not np.array_equal(np.asarray(image), np.asarray(other))


def _has_all_scans(encoded: bytes) -> bool:
    """Whether the scans of a JPEG file, by their headers, have all coefficients of all components in all bits."""
    components: set[int] = set()
    complete: dict[int, set[int]] = defaultdict(set)
    for code, position in jpeg_markers(encoded):
        segment = encoded[position + 2 : position + int.from_bytes(encoded[position : position + 2], "big")]
        if code in JPEG_FRAMES:
            components = set(segment[6::3])
        elif code == JPEG_START_OF_SCAN and len(segment) >= 4:
            first, last, bits = segment[-3:]
            for component in segment[1:-3:2]:
                if bits & 0x0F == 0:
                    complete[component].update(range(first, last + 1))
    return bool(components) and all(len(complete[component]) == _COEFFICIENTS for component in components)
