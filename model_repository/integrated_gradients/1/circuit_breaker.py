"""Lets `preprocess` shed load while the gradient worker is full, so that no image is decoded only to be refused.

The breaker is a file in shared memory, named after the server's process, the parent of both models' processes. It holds
three numbers: until when it is open (by the machine's monotonic clock), from how many gradients an image requests are
then refused, and how many gradients an image takes where their number depends on it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from pathlib import Path

from attribution_parameters import AttributionParameters

FOLDER = Path("/dev/shm")
FORMAT = "<ddd"
# Shortest and longest time that it is open after a refusal: long enough to save most of the work of an overload, short
# enough that requests are admitted soon after its end.
SECONDS, MOST_SECONDS = 0.25, 2.0


class CircuitOpenError(Exception):
    """The gradient worker would refuse the request; the message says so."""


def _file(server: int, folder: Path) -> Path:
    return folder / f"integrated_gradients_{server}.breaker"


class CircuitBreaker:
    """The gradient worker's side.

    Args:
        server: process number of the server.
        usual_rows: expected gradients of an image where their number depends on it.
        folder: of the file.
    """

    def __init__(self, server: int, usual_rows: int, folder: Path = FOLDER) -> None:
        self._file, self._usual_rows = _file(server, folder), usual_rows
        self._until, self._rows = 0.0, 0.0

    def open(self, rows: int, seconds: float = SECONDS) -> None:
        """Open for ``seconds``, after a request of ``rows`` gradients an image was refused."""
        now = time.monotonic()
        if now < self._until and self._rows < rows:
            return  # larger requests must not keep it open for smaller ones
        self._until, self._rows = now + min(max(seconds, SECONDS), MOST_SECONDS), float(rows)
        with contextlib.suppress(OSError):  # without the file requests are refused later, at the worker
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            try:
                os.write(descriptor, struct.pack(FORMAT, self._until, self._rows, self._usual_rows))
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        """Delete the file."""
        self._file.unlink(missing_ok=True)


def check_circuit(server: int, parameters: AttributionParameters, folder: Path = FOLDER) -> None:
    """Refuse a request that the gradient worker would refuse now.

    Args:
        server: process number of the server.
        parameters: the request's.
        folder: of the file.

    Raises:
        CircuitOpenError: the worker would refuse it.
    """
    try:
        until, rows, usual_rows = _read(_file(server, folder))
    except (OSError, struct.error):
        return  # nothing was ever refused
    now = time.monotonic()
    if now < until <= now + MOST_SECONDS and _expected_rows(parameters, usual_rows) >= rows:
        raise CircuitOpenError(f"requests of {rows:.0f} gradients an image and more are refused at present")


def _read(file: Path) -> tuple[float, float, float]:
    """Content of the file; zeros, which refuse nothing, if another user owns it."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return 0.0, 0.0, 0.0
        until, rows, usual_rows = struct.unpack(FORMAT, os.read(descriptor, struct.calcsize(FORMAT) + 1))
        return until, rows, usual_rows
    finally:
        os.close(descriptor)


def _expected_rows(parameters: AttributionParameters, usual_rows: float) -> float:
    """Expected gradients an image; 0 with a deadline, because such requests go first.

    The images of the baseline ``images`` count as one, since their number is known to the worker alone.
    """
    if parameters.deadline_ms is not None:
        return 0
    steps = parameters.n_steps if parameters.tolerance is None else min(parameters.n_steps, usual_rows)
    return steps * parameters.nt_samples * len(parameters.baselines)
