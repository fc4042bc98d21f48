"""A word to `preprocess` that the gradients take no more, so that nothing is decoded and classified only to be refused.

It lies in shared memory, by the server's process, which both have for a parent: until when (by the machine's monotonic
clock) requests of how many gradients an image, and more, are turned away. `preprocess/1/overload_reading.py` reads it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from pathlib import Path

FOLDER = Path("/dev/shm")
FORMAT = "<dd"
# From a refusal on, at least and at most: to spare most of the work of an overload, and to find its end.
SECONDS, MOST_SECONDS = 0.25, 2.0


class OverloadNotice:
    """The word of one server's gradients.

    Args:
        server: number of the server's process.
        folder: where it lies.
    """

    def __init__(self, server: int, folder: Path = FOLDER) -> None:
        self._file = folder / f"integrated_gradients_{server}.notice"
        self._until, self._rows = 0.0, 0.0

    def post(self, rows: int, seconds: float = SECONDS) -> None:
        """A request of so many gradients an image has just been refused, and so long there is likely no room."""
        now = time.monotonic()
        if now < self._until and self._rows < rows:
            return  # the word that is out says more, and must not be kept up by less
        self._until, self._rows = now + min(max(seconds, SECONDS), MOST_SECONDS), float(rows)
        with contextlib.suppress(OSError):  # it spares work, and nothing depends on it
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.write(descriptor, struct.pack(FORMAT, self._until, self._rows))
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        """Leave nothing."""
        self._file.unlink(missing_ok=True)
