"""Which requests may wait for their gradients, and how long. No tensors."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(eq=False)
class RequestStart:
    """When the first row of a request is passed. The request's tasks share it, so they are given up together.

    Attributes:
        latest: by ``time.monotonic``; the request is given up if it has not begun by then.
        has_begun: whether one of its tasks has started.
    """

    latest: float = math.inf
    has_begun: bool = False

    @property
    def is_too_late(self) -> bool:
        return not self.has_begun and time.monotonic() >= self.latest


class OverloadedError(Exception):
    """Too many jobs or rows wait already; the message says how many.

    Attributes:
        rows: at present, jobs of at least this many rows are refused; None if that is not known.
        seconds: until there is likely room.
    """

    def __init__(self, message: str, rows: int | None, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.rows, self.seconds = rows, seconds


@dataclass(frozen=True)
class Admission:
    """Which jobs may wait.

    Attributes:
        max_wait_seconds: longest wait for a request's first row. A request expected to wait longer is rejected
            immediately; one that has waited longer is given up.
        max_waiting: most jobs that wait or run at once, which bounds their memory.
    """

    max_wait_seconds: float
    max_waiting: int

    def check(self, jobs: int, rows: int, waiting: int, wait_seconds: float) -> None:
        """Admit jobs of one request.

        Args:
            jobs: their number.
            rows: expected rows of each.
            waiting: number of jobs that wait or run.
            wait_seconds: expected seconds until their first row.

        Raises:
            OverloadedError: they are rejected.
        """
        if waiting and waiting + jobs > self.max_waiting:  # a request that comes alone is never too large
            raise OverloadedError(
                f"{waiting} images wait for their gradients, and at most {self.max_waiting} may",
                0 if jobs == 1 else None,
            )
        if wait_seconds > self.max_wait_seconds:
            raise OverloadedError(
                f"the gradients that go before take about {wait_seconds:.1f} s, and at most "
                f"{self.max_wait_seconds:g} s may be waited",
                rows,
                wait_seconds - self.max_wait_seconds,
            )
