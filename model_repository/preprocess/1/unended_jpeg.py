"""JPEG files whose end marker is missing, as an interrupted transfer leaves them.

Browsers and phones show such a file. It is accepted if it lacks nothing else. A decoder fills in what is missing, and
does not tell whether it did. So the file is decoded twice, with different bytes behind its own: if pixels are missing,
they depend on these bytes.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict

import numpy as np
from PIL import Image

END = b"\xff\xd9"
# libjpeg replaces a unit of blocks that the end marker cuts off, whatever its first bits. The longest unit, 10 blocks
# of 64 coefficients of up to 26 bits, takes 2,080 bytes. Where a restart marker comes next, all before it is skipped.
_OTHER_BITS = b"\xaa" * 4096
_OTHER_BYTES = _OTHER_BITS + b"".join(bytes((0xFF, code)) + _OTHER_BITS for code in range(0xD0, 0xD8))
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_START_OF_SCAN = 0xDA
_COEFFICIENTS = 64


def ended(encoded: bytes) -> bytes:
    """A JPEG file with an end marker in place of its last bytes, which may be a half one."""
    return encoded.removesuffix(b"\xff") + END


def lacks_pixels(encoded: bytes, image: Image.Image) -> bool:
    """Whether a file without an end marker lacks more than that.

    Args:
        encoded: the file.
        image: opened from ``ended(encoded)``; decoded in place if the file has all scans.
    """
    if not _has_all_scans(encoded):
        return True
    image.load()
    other = Image.open(io.BytesIO(encoded.removesuffix(b"\xff") + _OTHER_BYTES + END), formats=("JPEG",))
    return not np.array_equal(np.asarray(image), np.asarray(other))


def _has_all_scans(encoded: bytes) -> bool:
    """Whether the scans of a JPEG file, by their headers, have all coefficients of all components in all bits."""
    components: set[int] = set()
    complete: dict[int, set[int]] = defaultdict(set)
    position = 2
    while marker := _MARKER.search(encoded, position):
        code, position = marker[0][1], marker.end()
        segment = encoded[position + 2 : position + int.from_bytes(encoded[position : position + 2], "big")]
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            components = set(segment[6::3])
        elif code == _START_OF_SCAN and len(segment) >= 4:
            first, last, bits = segment[-3:]
            for component in segment[1:-3:2]:
                if bits & 0x0F == 0:
                    complete[component].update(range(first, last + 1))
        position += 2 + len(segment)
    return bool(components) and all(len(complete[component]) == _COEFFICIENTS for component in components)
