"""Whether the gradients have said that they take no more: `integrated_gradients/1/overload_notice.py` writes it."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path("/dev/shm")
FORMAT = "<dd"
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
        until, rows = struct.unpack(FORMAT, (folder / f"integrated_gradients_{server}.notice").read_bytes())
    except (OSError, struct.error):
        return  # they have never refused any
    if time.monotonic() < until and gradients_asked(parameters) >= rows:
        raise OverloadedError(
            f"integrated_gradients is overloaded: requests of {rows:.0f} gradients an image and more are turned away"
        )


def gradients_asked(parameters: Mapping[str, Any]) -> int:
    """Gradients an image that a request asks for, as far as known; 0 with a deadline, which goes before others."""
    if "deadline_ms" in parameters:
        return 0
    steps = USUAL_STEPS if "tolerance" in parameters else parameters.get("n_steps", DEFAULT_STEPS)
    try:
        return int(steps) * int(parameters.get("nt_samples", 1))
    except (TypeError, ValueError):
        return 0
