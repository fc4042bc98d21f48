"""Whether the gradients have said that they take no more: `integrated_gradients/1/overload_notice.py` writes it."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path("/dev/shm")
FORMAT = "<dd"
# A word for longer is none of the gradients'.
MOST_SECONDS = 2.0
# Of a request that does not say how many, or finds them on the way: see the contract's defaults.
DEFAULT_STEPS, USUAL_STEPS = 50, 8


class OverloadedError(Exception):
    """The gradients would refuse it; the message says so."""


def check_overload(server: int, parameters: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Refuse a request that the gradients would refuse now.

    Args:
        server: number of the server's process.
        parameters: of the request; what is not valid is for the gradients to refuse.
        folder: where the word lies.

    Raises:
        OverloadedError: they would.
    """
    try:
        until, rows = _read_word(folder / f"integrated_gradients_{server}.notice")
    except (OSError, struct.error):
        return  # they have never refused any
    now = time.monotonic()
    if now < until <= now + MOST_SECONDS and gradients_asked(parameters) >= rows:
        raise OverloadedError(
            f"integrated_gradients is overloaded: requests of {rows:.0f} gradients an image and more are turned away"
        )


def _read_word(file: Path) -> tuple[float, float]:
    """Until when, and from how many gradients on; of files that this process's user has not written, never."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return 0.0, 0.0
        return struct.unpack(FORMAT, os.read(descriptor, struct.calcsize(FORMAT) + 1))
    finally:
        os.close(descriptor)


def gradients_asked(parameters: Mapping[str, Any]) -> int:
    """Gradients an image that a request asks for, as far as known; 0 with a deadline, which goes before others."""
    if "deadline_ms" in parameters:
        return 0
    steps = USUAL_STEPS if "tolerance" in parameters else parameters.get("n_steps", DEFAULT_STEPS)
    try:
        return int(steps) * int(parameters.get("nt_samples", 1))
    except (TypeError, ValueError):
        return 0
